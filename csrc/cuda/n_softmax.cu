#include <cmath>

#include "csp/n_softmax.h"
#include "reduce.cuh"
#include "simt.cuh"

namespace csp {
namespace {

using namespace simt;

constexpr int kThreads = 256;
constexpr float kLog2E = 1.4426950408889634f;

// One block per row, grid-stride over rows.
template <typename T>
CSP_KERNEL(kThreads, 4)
void n_softmax_kernel(const void* logits, void* out, int64_t rows, int64_t cols, float log2_n) {
  CSP_SHARED(float, scratch, kThreads / 32);
  for (int64_t row = block_x(); row < rows; row += grid_x()) {
    const Global<const T> x = global<T>(logits) + row * cols;
    const Global<T> y = global<T>(out) + row * cols;

    float top = -INFINITY;
    for (int64_t j = thread(); j < cols; j += kThreads) top = fmaxf(top, to_float(T(x[j])) * kLog2E);
    top = reduce_block<kThreads / 32>(top, Shared<float>(scratch), Max());
    const float shift = top == -INFINITY ? fmaxf(log2_n, 0.0f) : fmaxf(top, log2_n);

    float sum = 0;
    for (int64_t j = thread(); j < cols; j += kThreads)
      sum += exp2_approx(to_float(T(x[j])) * kLog2E - shift);
    // n 2^-shift as 2^(log2 n - shift): for n = 0 or a tiny n the product would be 0 * inf.
    sum = reduce_block<kThreads / 32>(sum, Shared<float>(scratch), Add()) + exp2_approx(log2_n - shift);

    const float inverse = sum == 0 ? 0 : 1 / sum;  // a NaN goes on to the whole row
    for (int64_t j = thread(); j < cols; j += kThreads) {
      y[j] = from_float<T>(exp2_approx(to_float(T(x[j])) * kLog2E - shift) * inverse);
    }
  }
}

}  // namespace

CudaStatus n_softmax_cuda(const NSoftmaxParams& params, const CudaContext& context) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  if (params.rows == 0 || params.cols == 0) return {};
  LaunchShape shape;
  shape.x = params.rows < kMaxBlocks ? params.rows : kMaxBlocks;
  shape.threads = kThreads;
  const auto log2_n = static_cast<float>(params.n > 0 ? std::log2(params.n) : -INFINITY);
  return with_element(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return CSP_LAUNCH(context, shape, n_softmax_kernel<T>, params.logits, params.out, params.rows,
                      params.cols, log2_n);
  });
}

}  // namespace csp
