# Everything lands inside the Python package: libraries beside the modules, headers and the CMake config below them.
include(CMakePackageConfigHelpers)
set(csp_dir csp_ext)

set(csp_installed csp_ops_cpu _host)
if(CSP_HAVE_CUDA)
  list(APPEND csp_installed csp_ops_cuda)
endif()
install(TARGETS ${csp_installed} LIBRARY DESTINATION ${csp_dir} COMPONENT csp_ext)
add_custom_target(csp_install DEPENDS ${csp_installed})

set(csp_exported csp_headers csp_cpu csp_cuda_plan)
if(CSP_HAVE_CUDA)
  list(APPEND csp_exported csp_cuda)
endif()
add_dependencies(csp_install csp_cpu csp_cuda_plan)
install(DIRECTORY csrc/include/csp DESTINATION ${csp_dir}/include COMPONENT csp_ext)
install(TARGETS ${csp_exported} EXPORT csp_ext-targets ARCHIVE DESTINATION ${csp_dir}/lib COMPONENT csp_ext)
install(EXPORT csp_ext-targets NAMESPACE csp:: DESTINATION ${csp_dir}/share/cmake/csp_ext COMPONENT csp_ext)
configure_package_config_file(cmake/csp_ext-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/csp_ext-config.cmake
  INSTALL_DESTINATION ${csp_dir}/share/cmake/csp_ext)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/csp_ext-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/csp_ext-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/csp_ext-config-version.cmake
  DESTINATION ${csp_dir}/share/cmake/csp_ext COMPONENT csp_ext)
