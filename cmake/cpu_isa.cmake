# Lists the CPU backend's sources and gives each instruction set's file its flags; the set is chosen at run time.
set(FLASH_MLA_CPU_SOURCES)
file(GLOB FLASH_MLA_CPU_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/src/cpu/*.cpp)

set(flash_mla_flags_avx2 -mavx2 -mfma -mf16c)
set(flash_mla_flags_avx512 ${flash_mla_flags_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
set(flash_mla_flags_avx512_bf16 ${flash_mla_flags_avx512} -mavx512bf16)
set(flash_mla_flags_amx ${flash_mla_flags_avx512_bf16} -mamx-tile -mamx-bf16)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  foreach(isa IN ITEMS avx2 avx512 avx512_bf16 amx)
    set(source ${CMAKE_CURRENT_SOURCE_DIR}/src/cpu/decode_${isa}.cpp)
    if(EXISTS ${source})
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${flash_mla_flags_${isa}}")
    endif()
  endforeach()
else()
  list(FILTER FLASH_MLA_CPU_SOURCES EXCLUDE REGEX "decode_(avx2|avx512|avx512_bf16|amx)\\.cpp$")
endif()
