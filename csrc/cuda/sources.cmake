# What the kernels of CSP_OPS are made of: <op>.cu and <op>.cpp, one <op>_<dtype>.cu each where they are many, and
# <op>_plan.cpp, plain C++ that decides the launches and so knows their cost without a GPU.
set(csp_cuda_sources "")
set(csp_cuda_plan_sources "")
foreach(op IN LISTS CSP_OPS)
  file(GLOB csp_found CONFIGURE_DEPENDS
    ${CMAKE_CURRENT_LIST_DIR}/${op}.cu ${CMAKE_CURRENT_LIST_DIR}/${op}.cpp
    ${CMAKE_CURRENT_LIST_DIR}/${op}_f32.cu ${CMAKE_CURRENT_LIST_DIR}/${op}_f16.cu
    ${CMAKE_CURRENT_LIST_DIR}/${op}_bf16.cu)
  list(APPEND csp_cuda_sources ${csp_found})
  file(GLOB csp_found CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/${op}_plan.cpp)
  list(APPEND csp_cuda_plan_sources ${csp_found})
endforeach()
