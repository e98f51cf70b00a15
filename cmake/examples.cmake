# A test that installs the package into a scratch folder, then configures, builds and runs the examples against it.
if(NOT FLASH_MLA_INSTALL)
  message(FATAL_ERROR "flash_mla: FLASH_MLA_BUILD_EXAMPLES needs FLASH_MLA_INSTALL")
endif()
set(flash_mla_programs_c decode)
set(flash_mla_programs_cpp decode,continuous_batching)
foreach(language IN ITEMS c cpp)
  add_test(NAME example_${language}
    COMMAND ${CMAKE_COMMAND}
      -D BUILD_DIR=${CMAKE_CURRENT_BINARY_DIR}
      -D SOURCE_DIR=${CMAKE_CURRENT_SOURCE_DIR}/examples/${language}
      -D WORK_DIR=${CMAKE_CURRENT_BINARY_DIR}/examples/${language}
      -D GENERATOR=${CMAKE_GENERATOR}
      -D C_COMPILER=${CMAKE_C_COMPILER}
      -D CXX_COMPILER=${CMAKE_CXX_COMPILER}
      -D PROGRAMS=${flash_mla_programs_${language}}
      -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/run_example.cmake)
  set_tests_properties(example_${language} PROPERTIES TIMEOUT 300)
endforeach()
