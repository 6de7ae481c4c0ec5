#include "n_softmax.cuh"

namespace csp {

int n_softmax_cuda(const NSoftmaxParams& params, void* stream) {
  if (params.rows == 0 || params.cols == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_n_softmax<float>(params, cuda_stream);
    case DType::kFloat16:
      return launch_n_softmax<__half>(params, cuda_stream);
    case DType::kBFloat16:
      return launch_n_softmax<__nv_bfloat16>(params, cuda_stream);
    case DType::kFloat64:
      return cudaErrorNotSupported;
  }
  return cudaErrorInvalidValue;
}

}  // namespace csp
