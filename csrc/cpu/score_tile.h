#pragma once

#include <utility>

#include "score_kernel.h"
#include "simd.h"

// The arithmetic of a score tile: 16 query rows lie across the lanes, keys run down memory.

namespace csp::CSP_ISA {
namespace {

constexpr int kRows = kScoreRows;
constexpr int kBlock = kScoreBlock;
constexpr int kVecs = kRows / kLanes;  // vectors of one key's 16 rows
constexpr int kStep = 12 / kVecs;      // keys of a step: 12 accumulators stay in registers
constexpr float kLowest = -3.4e38f;    // a maximum over nothing; finite, so that -inf - kLowest is no NaN

static_assert(kBlock % kStep == 0 && kBlock % kLanes == 0);

// A key stride up to this many floats keeps the rows of a step apart in the first cache; larger ones (often
// a power of two) would evict each other and are copied together first.
constexpr int64_t kDirectStride = 544;

// z[k][row] = scale * sum over d of query[d][row] * key[k][d], for kStep keys. Meanwhile the keys at `next`,
// from which the following step reads, are fetched.
template <typename T>
CSP_INLINE void multiply(const float* query, const float* key, int64_t stride, int64_t head_dim, float scale,
                         const T* next, int64_t next_stride, float* z) {
  constexpr int64_t kLine = 64 / sizeof(T);
  vfloat sums[kStep][kVecs] = {};
  const float* rows[kStep];
  for (int k = 0; k < kStep; ++k) rows[k] = key + k * stride;
  for (int64_t begin = 0; begin < head_dim; begin += kLine) {
    for (int k = 0; k < kStep; ++k) __builtin_prefetch(next + k * next_stride + begin);
    const int64_t end = begin + kLine < head_dim ? begin + kLine : head_dim;
    for (int64_t d = begin; d < end; ++d) {
      for (int k = 0; k < kStep; ++k) {
        for (int v = 0; v < kVecs; ++v) sums[k][v] += load(query + d * kRows + v * kLanes) * rows[k][d];
      }
    }
  }
  for (int k = 0; k < kStep; ++k) {
    for (int v = 0; v < kVecs; ++v) store(z + k * kRows + v * kLanes, sums[k][v] * scale);
  }
}

// kStep keys as float32 rows of head_dim, zeros where there are fewer.
template <typename T>
CSP_INLINE void convert(const T* key, int64_t stride, int64_t head_dim, int64_t count, float* out) {
  for (int64_t k = 0; k < kStep; ++k) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const vfloat row = k < count ? load_n(key + k * stride + d, head_dim - d, 0) : vfloat{};
      store_n(out + k * head_dim + d, row, head_dim - d);
    }
  }
}

CSP_INLINE void hide_rest(int64_t count, float* z) {
  for (int64_t k = count * kRows; k < kBlock * kRows; k += kLanes) store(z + k, set1(-kInf));
}

// Logits of `count` <= kBlock keys, -inf for the rest of the block.
template <typename T>
[[gnu::noinline]] void block_logits(const float* query, const T* key, int64_t stride, int64_t head_dim,
                                    int64_t count, float scale, float* converted, float* z) {
  for (int64_t k = 0; k < count; k += kStep) {
    const T* step = key + k * stride;
    const T* next = step + kStep * stride;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (k + kStep <= count && stride <= kDirectStride) {
        multiply(query, step, stride, head_dim, scale, next, stride, z + k * kRows);
        continue;
      }
    }
    convert(step, stride, head_dim, count - k, converted);
    multiply(query, converted, head_dim, head_dim, scale, next, stride, z + k * kRows);
  }
  hide_rest(count, z);
}

// z becomes e^(z - top), top its maximum per row; `sum` their sum per row.
CSP_INLINE void block_exponentials(float* z, float* top, float* sum) {
  for (int v = 0; v < kVecs; ++v) {
    vfloat best = set1(kLowest);
    for (int64_t k = 0; k < kBlock; ++k) best = vmax(load(z + k * kRows + v * kLanes), best);
    vfloat total{};
    for (int64_t k = 0; k < kBlock; ++k) {
      float* at = z + k * kRows + v * kLanes;
      const vfloat e = vexp(load(at) - best);
      store(at, e);
      total += e;
    }
    store(top + v * kLanes, best);
    store(sum + v * kLanes, total);
  }
}

// Lane i of the result: a's lanes i and i + stride added up where bit `stride` of i is clear, else b's.
template <int stride, int... lane>
CSP_INLINE vfloat fold(vfloat a, vfloat b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane & stride ? kLanes + lane - stride : lane)...) +
         __builtin_shufflevector(a, b, (lane & stride ? kLanes + lane : lane + stride)...);
}

// Lane i: the sum of the lanes of rows[i]. Folds pairs, then pairs of pairs, ...
template <int stride = 1>
CSP_INLINE vfloat lane_sums(const vfloat* rows) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  if constexpr (stride == kLanes / 2) {
    return fold<stride>(rows[0], rows[1], lanes);
  } else {
    vfloat half[kLanes / 2 / stride];
    for (int i = 0; i < kLanes / 2 / stride; ++i) half[i] = fold<stride>(rows[2 * i], rows[2 * i + 1], lanes);
    return lane_sums<stride * 2>(half);
  }
}

// Lane k: the sum over the 16 rows of weight[row] * e[k][row].
CSP_INLINE vfloat column_sums(const float* e, const vfloat* weight) {
  vfloat sums[kLanes];
  for (int k = 0; k < kLanes; ++k) {
    sums[k] = load(e + k * kRows) * weight[0];
    for (int v = 1; v < kVecs; ++v) sums[k] += load(e + k * kRows + v * kLanes) * weight[v];
  }
  return lane_sums(sums);
}

}  // namespace
}  // namespace csp::CSP_ISA
