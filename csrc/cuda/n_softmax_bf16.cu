#include "n_softmax.cuh"

namespace csp {
template cudaError_t launch_n_softmax<__nv_bfloat16>(const NSoftmaxParams&, cudaStream_t);
}  // namespace csp
