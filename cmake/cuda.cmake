# Decides whether the CUDA backend is built (FLASH_MLA_WITH_CUDA), lists its sources and says how they are compiled.
set(FLASH_MLA_WITH_CUDA OFF)
set(FLASH_MLA_CUDA_SOURCES)
set(flash_mla_oldest_cuda 12.8)

if(FLASH_MLA_CUDA STREQUAL "AUTO" OR FLASH_MLA_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    # The one architecture is given in flash_mla_enable_cuda(); this keeps CMake from adding its own.
    set(CMAKE_CUDA_ARCHITECTURES OFF)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
  endif()
  if(CMAKE_CUDA_COMPILER AND CUDAToolkit_VERSION VERSION_GREATER_EQUAL ${flash_mla_oldest_cuda})
    set(FLASH_MLA_WITH_CUDA ON)
    message(STATUS "flash_mla: CUDA backend ON (CUDA ${CUDAToolkit_VERSION}, sm_90a)")
  elseif(FLASH_MLA_CUDA STREQUAL "AUTO")
    message(WARNING "flash_mla: no nvcc of CUDA ${flash_mla_oldest_cuda} or newer: building WITHOUT the CUDA "
                    "backend, for the CPU alone. CUDACXX names an nvcc; FLASH_MLA_CUDA=OFF silences this.")
  else()
    message(FATAL_ERROR "flash_mla: FLASH_MLA_CUDA=ON, but no nvcc of CUDA ${flash_mla_oldest_cuda} or "
                        "newer was found; set CUDACXX to its path")
  endif()
endif()

if(FLASH_MLA_WITH_CUDA)
  file(GLOB FLASH_MLA_CUDA_SOURCES CONFIGURE_DEPENDS src/cuda/sm90/*/*.cu)  # one folder a kernel
  list(APPEND FLASH_MLA_CUDA_SOURCES
    src/cuda/append_kv.cu
    src/cuda/decode_config.cpp
    src/cuda/merge_states.cu
    src/cuda/validate.cu
    src/cuda/workspace.cpp
    src/cuda/common/device.cpp
    src/cuda/common/error.cpp
    src/cuda/common/host.cpp
    src/cuda/common/properties.cpp
    src/cuda/common/tensor_map.cpp
    src/cuda/planner/plan_decode.cu)
endif()

# Compiles the CUDA sources of `target` for sm_90a. ptxas reports registers and spills of every kernel (-Xptxas=-v) in the
# build's output, where tools/check_spills.py reads them. libcuda is not linked: its entry points are fetched at run time.
function(flash_mla_enable_cuda target)
  math(EXPR version "${CUDAToolkit_VERSION_MAJOR} * 1000 + ${CUDAToolkit_VERSION_MINOR} * 10")
  target_compile_definitions(${target} PRIVATE FLASH_MLA_WITH_CUDA FLASH_MLA_CUDA_VERSION=${version})
  # NOTE: -std by hand, since CUDA_STANDARD 20 is unknown to CMake 3.25.1 (Debian 12).
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_90a,code=sm_90a>"
    $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills>
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
endfunction()
