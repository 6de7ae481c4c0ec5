#include "n_softmax_kernel.h"

#include "simd.h"

namespace csp::CSP_ISA {
namespace {

template <typename T>
void row_of(const T* x, T* out, int64_t cols, float n) {
  vfloat top = set1(-kInf);
  for (int64_t j = 0; j < cols; j += kLanes) top = vmax(load_n(x + j, cols - j, -kInf), top);
  float shift = hmax(top);
  const bool empty = shift == -kInf;
  if (n > 0) {
    const float log_n = __builtin_logf(n);
    shift = log_n > shift ? log_n : shift;
  }
  if (empty) shift = 0;

  float sum = n * __builtin_expf(-shift);
  vfloat sums{};
  for (int64_t j = 0; j < cols; j += kLanes) sums += vexp(load_n(x + j, cols - j, -kInf) - shift);
  sum += hsum(sums);

  const float inverse = sum > 0 ? 1 / sum : 0;
  for (int64_t j = 0; j < cols; j += kLanes) {
    store_n(out + j, vexp(load_n(x + j, cols - j, -kInf) - shift) * inverse, cols - j);
  }
}

void row_of(const double* x, double* out, int64_t cols, double n) {
  double shift = n > 0 ? __builtin_log(n) : -__builtin_inf();
  for (int64_t j = 0; j < cols; ++j) shift = x[j] > shift ? x[j] : shift;
  if (shift == -__builtin_inf()) shift = 0;
  double sum = n * __builtin_exp(-shift);
  for (int64_t j = 0; j < cols; ++j) sum += __builtin_exp(x[j] - shift);
  for (int64_t j = 0; j < cols; ++j) out[j] = sum > 0 ? __builtin_exp(x[j] - shift) / sum : 0;
}

template <typename T, typename N>
void rows_of(const NSoftmaxParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    row_of(static_cast<const T*>(p.logits) + row * p.cols, static_cast<T*>(p.out) + row * p.cols, p.cols,
           static_cast<N>(p.n));
  }
}

}  // namespace

void n_softmax_rows(const NSoftmaxParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32:
      return rows_of<float, float>(params, begin, end);
    case DType::kFloat16:
      return rows_of<Float16, float>(params, begin, end);
    case DType::kBFloat16:
      return rows_of<BFloat16, float>(params, begin, end);
    case DType::kFloat64:
      return rows_of<double, double>(params, begin, end);
  }
}

}  // namespace csp::CSP_ISA
