#pragma once

#include "score_kernel.h"
#include "simd.h"

// The float64 path: one row at a time, plain scalar arithmetic.

namespace csp::CSP_ISA {
namespace {

CSP_INLINE double dot(const double* a, const double* b, int64_t size) {
  double sums[4] = {};
  int64_t d = 0;
  for (; d + 4 <= size; d += 4) {
    for (int i = 0; i < 4; ++i) sums[i] += a[d + i] * b[d + i];
  }
  for (; d < size; ++d) sums[0] += a[d] * b[d];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Rows [begin, end) of the task's observing queries, added to self and cross.
inline void chunk_f64(const ScoreParams& p, const ScorePlan& plan, int64_t b, int64_t kv_head, int64_t begin,
                      int64_t end, const ScoreScratch& s, double* self, double* cross) {
  const double none = -__builtin_inf();
  const double log_n = p.n > 0 ? __builtin_log(p.n) : none;
  const double* keys =
      static_cast<const double*>(p.key) + b * p.key_stride.batch + kv_head * p.key_stride.head;
  double* const z = static_cast<double*>(s.tile);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = s.order[row / plan.group];
    const int64_t head = kv_head * plan.group + row % plan.group;
    const double* query = static_cast<const double*>(p.query) + b * p.query_stride.batch +
                          head * p.query_stride.head + i * p.query_stride.row;
    const int64_t limit = p.causal ? p.keys - p.window + i + 1 : p.keys;

    double top = log_n;
    for (int64_t j = 0; j < limit; ++j) {
      if (s.modality[j] < 0) continue;
      z[j] = p.scale * dot(query, keys + j * p.key_stride.row, p.head_dim);
      top = z[j] <= top ? top : z[j];
    }
    double weight = 0;
    if (p.lse != nullptr) {
      top = static_cast<const double*>(p.lse)[(b * p.num_heads + head) * p.window + i];
      if (top == none) continue;
      weight = plan.mean / (1 + __builtin_exp(log_n - top));
    } else {
      if (top == none) continue;
      double sum = __builtin_exp(log_n - top);
      for (int64_t j = 0; j < limit; ++j) {
        if (s.modality[j] >= 0) sum += __builtin_exp(z[j] - top);
      }
      weight = plan.mean / sum;
    }
    const int8_t modality = p.query_modality[b * p.window + i];
    for (int64_t j = 0; j < limit; ++j) {
      if (s.modality[j] < 0) continue;
      double* const out = s.modality[j] == modality ? self : cross;
      out[j] += weight * __builtin_exp(z[j] - top);
    }
  }
}

}  // namespace
}  // namespace csp::CSP_ISA
