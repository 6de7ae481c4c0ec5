#pragma once

#include <cmath>

#include <cuda_runtime.h>

#include "csp/n_softmax.h"
#include "numeric.cuh"

namespace csp {

// One instantiation per translation unit: n_softmax_<dtype>.cu.
template <typename T>
cudaError_t launch_n_softmax(const NSoftmaxParams& params, cudaStream_t stream);

#ifdef __CUDACC__

constexpr int kNSoftmaxThreads = 256;

// Combines one value per thread over the block; every thread gets the result. Fixed order: deterministic.
template <typename Op>
__device__ float block_reduce(float value, float* shared, Op op) {
  for (int offset = 16; offset > 0; offset /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kNSoftmaxThreads / 32; ++warp) value = op(value, shared[warp]);
  return value;
}

// One block per row, grid-stride over rows.
template <typename T>
__global__ void __launch_bounds__(kNSoftmaxThreads)
    n_softmax_kernel(const T* logits, T* out, int64_t rows, int64_t cols, float log_n) {
  __shared__ float shared[kNSoftmaxThreads / 32];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = logits + row * cols;
    T* y = out + row * cols;

    float top = -INFINITY;
    for (int64_t j = threadIdx.x; j < cols; j += kNSoftmaxThreads) top = fmaxf(top, to_float(x[j]));
    top = block_reduce(top, shared, [](float a, float b) { return fmaxf(a, b); });
    const float shift = top == -INFINITY ? fmaxf(log_n, 0.0f) : fmaxf(top, log_n);

    float sum = 0;
    for (int64_t j = threadIdx.x; j < cols; j += kNSoftmaxThreads) sum += __expf(to_float(x[j]) - shift);
    // n e^-shift as e^(log n - shift): for n = 0 or a tiny n the product would be 0 * inf.
    sum = block_reduce(sum, shared, [](float a, float b) { return a + b; }) + __expf(log_n - shift);

    const float inverse = sum == 0 ? 0 : 1 / sum;  // a NaN goes on to the whole row
    for (int64_t j = threadIdx.x; j < cols; j += kNSoftmaxThreads) {
      y[j] = from_float<T>(__expf(to_float(x[j]) - shift) * inverse);
    }
  }
}

template <typename T>
cudaError_t launch_n_softmax(const NSoftmaxParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  const auto blocks = static_cast<unsigned>(params.rows < kMaxBlocks ? params.rows : kMaxBlocks);
  const double log_n = params.n > 0 ? std::log(params.n) : -INFINITY;
  n_softmax_kernel<T><<<blocks, kNSoftmaxThreads, 0, stream>>>(static_cast<const T*>(params.logits),
                                                               static_cast<T*>(params.out), params.rows,
                                                               params.cols, static_cast<float>(log_n));
  return cudaGetLastError();
}

#endif  // __CUDACC__

}  // namespace csp
