# Lists the CPU backend's sources and gives each instruction set's file its flags; the set is chosen at run time.
set(FLASH_MLA_CPU_SOURCES
  src/cpu/append_kv.cpp
  src/cpu/decode.cpp
  src/cpu/isa.cpp
  src/cpu/merge_states.cpp
  src/cpu/threads.cpp)
set(flash_mla_isas baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND flash_mla_isas avx2 avx512 avx512_bf16 amx)
endif()

set(flash_mla_flags_baseline -O3 -ffp-contract=fast)
set(flash_mla_flags_avx2 ${flash_mla_flags_baseline} -mavx2 -mfma -mf16c)
set(flash_mla_flags_avx512 ${flash_mla_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(flash_mla_flags_avx512_bf16 ${flash_mla_flags_avx512} -mavx512bf16)
set(flash_mla_flags_amx ${flash_mla_flags_avx512_bf16} -mamx-tile -mamx-bf16)

foreach(isa IN LISTS flash_mla_isas)
  list(APPEND FLASH_MLA_CPU_SOURCES src/cpu/kernels_${isa}.cpp)
  set_source_files_properties(src/cpu/kernels_${isa}.cpp PROPERTIES
    COMPILE_OPTIONS "${flash_mla_flags_${isa}}")
endforeach()
