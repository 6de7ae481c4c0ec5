#include "n_softmax.cuh"

namespace csp {
template cudaError_t launch_n_softmax<float>(const NSoftmaxParams&, cudaStream_t);
}  // namespace csp
