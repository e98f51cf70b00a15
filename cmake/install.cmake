# Install rules: libraries, headers and the CMake package that find_package(flash_mla) reads.
include(CMakePackageConfigHelpers)
set(flash_mla_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flash_mla)

install(DIRECTORY include/flash_mla DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT flash_mla
        FILES_MATCHING PATTERN "*.h")
install(TARGETS flash_mla_static flash_mla_shared EXPORT flash_mla_targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT flash_mla
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT flash_mla)
install(EXPORT flash_mla_targets NAMESPACE flash_mla:: FILE flash_mla-targets.cmake
        DESTINATION ${flash_mla_package_dir} COMPONENT flash_mla)
configure_package_config_file(cmake/flash_mla-config.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/flash_mla-config.cmake INSTALL_DESTINATION ${flash_mla_package_dir})
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/flash_mla-config-version.cmake
  VERSION ${PROJECT_VERSION} COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flash_mla-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/flash_mla-config-version.cmake
        DESTINATION ${flash_mla_package_dir} COMPONENT flash_mla)
