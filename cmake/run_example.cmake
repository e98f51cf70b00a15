# Script of the example tests: install BUILD_DIR into WORK_DIR/prefix, build SOURCE_DIR against it, run its PROGRAMS.
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE ${WORK_DIR})
string(REPLACE "," ";" PROGRAMS ${PROGRAMS})
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${WORK_DIR}/prefix --component flash_mla)
foreach(library IN ITEMS static shared)
  run(${CMAKE_COMMAND} -S ${SOURCE_DIR} -B ${WORK_DIR}/${library} -G "${GENERATOR}"
      -D CMAKE_BUILD_TYPE=Release -D CMAKE_C_COMPILER=${C_COMPILER} -D CMAKE_CXX_COMPILER=${CXX_COMPILER}
      -D CMAKE_PREFIX_PATH=${WORK_DIR}/prefix -D FLASH_MLA_LIBRARY=flash_mla::flash_mla_${library})
  run(${CMAKE_COMMAND} --build ${WORK_DIR}/${library})
  foreach(program IN LISTS PROGRAMS)
    run(${WORK_DIR}/${library}/${program})
  endforeach()
endforeach()
