#include "n_softmax_kernel.h"

#include "simd.h"

namespace csp::CSP_ISA {
namespace {

// Calls fn(j, count) for each vector of a row; count < kLanes only at its end.
template <typename Fn>
CSP_INLINE void for_each_vector(int64_t cols, Fn fn) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) fn(j, int64_t{kLanes});
  if (j < cols) fn(j, cols - j);
}

template <typename T>
void row_of(const T* x, T* out, int64_t cols, float n) {
  vfloat top = set1(-kInf);
  for_each_vector(cols, [&](int64_t j, int64_t count) { top = vmax(load_n(x + j, count, -kInf), top); });
  float shift = hmax(top);
  if (n > 0) {
    const float log_n = __builtin_logf(n);
    shift = log_n > shift ? log_n : shift;
  }
  if (shift == -kInf) shift = 0;

  vfloat sums{};
  for_each_vector(cols, [&](int64_t j, int64_t count) {
    const vfloat e = vexp(load_n(x + j, count, -kInf) - shift);
    sums += e;
    // float32 has room for the exponentials themselves; a narrower type would round them twice.
    if constexpr (sizeof(T) == sizeof(float)) store_n(out + j, e, count);
  });
  const float sum = n * __builtin_expf(-shift) + hsum(sums);

  const float inverse = sum > 0 ? 1 / sum : 0;
  for_each_vector(cols, [&](int64_t j, int64_t count) {
    if constexpr (sizeof(T) == sizeof(float)) {
      store_n(out + j, load_n(out + j, count, 0) * inverse, count);
    } else {
      store_n(out + j, vexp(load_n(x + j, count, -kInf) - shift) * inverse, count);
    }
  });
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
