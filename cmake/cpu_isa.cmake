# Lists the CPU backend's sources and gives each instruction set's file its flags; the set is chosen at run time.
file(GLOB FLASH_MLA_CPU_SOURCES CONFIGURE_DEPENDS src/cpu/*.cpp)

set(flash_mla_flags_baseline -O3 -ffp-contract=fast)
set(flash_mla_flags_avx2 ${flash_mla_flags_baseline} -mavx2 -mfma -mf16c)
set(flash_mla_flags_avx512 ${flash_mla_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(flash_mla_flags_amx ${flash_mla_flags_avx512} -mamx-tile -mamx-bf16)

if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(FILTER FLASH_MLA_CPU_SOURCES EXCLUDE REGEX "kernels_(avx2|avx512|amx)\\.cpp$")
endif()
foreach(isa IN ITEMS baseline avx2 avx512 amx)
  set_source_files_properties(${CMAKE_CURRENT_SOURCE_DIR}/src/cpu/kernels_${isa}.cpp PROPERTIES
    COMPILE_OPTIONS "${flash_mla_flags_${isa}}")
endforeach()
