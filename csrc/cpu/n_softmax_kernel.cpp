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
void row_of(const T* x, T* out, int64_t cols, double log_n) {
  vfloat top = set1(-kInf);
  for_each_vector(cols, [&](int64_t j, int64_t count) { top = vmax(load_n(x + j, count, -kInf), top); });
  const float highest = hmax(top), least = static_cast<float>(log_n);
  float shift = least > highest ? least : highest;
  if (shift == -kInf) shift = 0;

  vfloat sums{};
  for_each_vector(cols, [&](int64_t j, int64_t count) {
    const vfloat e = vexp(load_n(x + j, count, -kInf) - shift);
    sums += e;
    // float32 has room for the exponentials themselves; a narrower type would round them twice.
    if constexpr (sizeof(T) == sizeof(float)) store_n(out + j, e, count);
  });
  const float sum = vexp(set1(static_cast<float>(log_n - shift)))[0] + hsum(sums);

  const float inverse = sum == 0 ? 0 : 1 / sum;  // a NaN goes on to the whole row
  for_each_vector(cols, [&](int64_t j, int64_t count) {
    if constexpr (sizeof(T) == sizeof(float)) {
      store_n(out + j, load_n(out + j, count, 0) * inverse, count);
    } else {
      store_n(out + j, vexp(load_n(x + j, count, -kInf) - shift) * inverse, count);
    }
  });
}

void row_of(const double* x, double* out, int64_t cols, double log_n) {
  double shift = log_n;
  for (int64_t j = 0; j < cols; ++j) shift = x[j] > shift ? x[j] : shift;
  if (shift == -__builtin_inf()) shift = 0;
  double sum = __builtin_exp(log_n - shift);
  for (int64_t j = 0; j < cols; ++j) sum += __builtin_exp(x[j] - shift);
  for (int64_t j = 0; j < cols; ++j) out[j] = sum == 0 ? 0 : __builtin_exp(x[j] - shift) / sum;
}

template <typename T>
void rows_of(const NSoftmaxParams& p, int64_t begin, int64_t end) {
  // n e^-shift is computed as e^(log n - shift): for n = 0 or a tiny n the product would be 0 * inf.
  const double log_n = p.n > 0 ? __builtin_log(p.n) : -__builtin_inf();
  for (int64_t row = begin; row < end; ++row) {
    row_of(static_cast<const T*>(p.logits) + row * p.cols, static_cast<T*>(p.out) + row * p.cols, p.cols,
           log_n);
  }
}

}  // namespace

void n_softmax_rows(const NSoftmaxParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32:
      return rows_of<float>(params, begin, end);
    case DType::kFloat16:
      return rows_of<Float16>(params, begin, end);
    case DType::kBFloat16:
      return rows_of<BFloat16>(params, begin, end);
    case DType::kFloat64:
      return rows_of<double>(params, begin, end);
  }
}

}  // namespace csp::CSP_ISA
