#include <cuda_runtime.h>

#include "csp/cuda.h"

namespace csp {

CudaDevice cuda_device(int32_t ordinal, int* error) {
  CudaDevice device;
  cudaError_t status = ordinal < 0 ? cudaGetDevice(&ordinal) : cudaSuccess;
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, ordinal);
    return value;
  };
  device.multiprocessors = get(cudaDevAttrMultiProcessorCount);
  device.capability = 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  device.shared_bytes = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.l2_bytes = get(cudaDevAttrL2CacheSize);
  *error = status;
  return device;
}

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace csp
