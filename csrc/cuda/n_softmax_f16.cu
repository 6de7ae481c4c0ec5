#include "n_softmax.cuh"

namespace csp {
template cudaError_t launch_n_softmax<__half>(const NSoftmaxParams&, cudaStream_t);
}  // namespace csp
