#pragma once

#include "score_plan.h"
#include "simt.cuh"

// What the kernels of score share: their arguments, rows and heads, and the arithmetic of a row's normaliser.
//
// Logits are in units of log2: t = scale log2(e) q.k. Then P = 2^(t - c) with one constant for each row,
// c = log2(n + sum of 2^t).
namespace csp::score_kernels {

using namespace simt;

struct ScoreArgs {
  const void* query;
  const void* key;
  const int8_t* modality;
  const int8_t* query_modality;
  const void* lse;  // or null
  void* partials;   // float [head of the launch, row, split, 2]: maximum and sum
  void* self;       // float [L] of head 0, the others out_stride further on
  void* cross;
  int64_t out_stride;
  Strides query_stride;
  Strides key_stride;
  int32_t first_head;  // of this launch, counted over batch and KV heads
  int32_t num_heads;   // of this launch
  int32_t num_kv_heads;
  int32_t group;
  int32_t rows;
  int32_t window;
  int32_t keys;
  int32_t head_dim;
  int32_t tile_rows;
  int32_t split_keys;
  int32_t splits;
  int32_t key_warps;
  float scale;   // scale * log2(e)
  float log2_n;  // -inf for n = 0
  float mean;    // 1 / query heads of an output row
  bool causal;
  bool vectors;  // kFma: rows of query and key may be read 16 bytes at a time
};

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.4028234663852886e38f;  // a maximum over nothing: -inf - kLowest is no NaN
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMixed = -2;  // rows of several modalities; -1: rows that count for nothing

// ---- heads and rows ----

struct Head {
  int batch;
  int kv_head;
  int in_launch;
};

CSP_DEVICE Head head_of(const ScoreArgs& a, int in_launch) {
  const int head = a.first_head + in_launch;
  const int batch = head / a.num_kv_heads;
  return {batch, head - batch * a.num_kv_heads, in_launch};
}

// Heads are the y of the grid, what is of one head its x.
CSP_DEVICE int block_in_head() {
  return static_cast<int>(block_x());
}

// The second pass takes the heads in reverse, so that it begins with the keys that the first read last.
CSP_DEVICE Head head_of_rows(const ScoreArgs& a) {
  return head_of(a, static_cast<int>(block_y()));
}
CSP_DEVICE Head head_of_columns(const ScoreArgs& a) {
  return head_of(a, a.num_heads - 1 - static_cast<int>(block_y()));
}

// Where the sums of a row and a split lie.
CSP_DEVICE int64_t partial_at(const ScoreArgs& a, const Head& head, int row, int split) {
  return ((static_cast<int64_t>(head.in_launch) * a.rows + row) * a.splits + split) * 2;
}

template <typename T>
CSP_DEVICE Global<const T> keys_of(const ScoreArgs& a, const Head& head) {
  return global<T>(a.key) + (head.batch * a.key_stride.batch + head.kv_head * a.key_stride.head);
}

// Of the first query head of the group.
template <typename T>
CSP_DEVICE Global<const T> queries_of(const ScoreArgs& a, const Head& head) {
  return global<T>(a.query) +
         (head.batch * a.query_stride.batch + head.kv_head * (a.group * a.query_stride.head));
}

// Modality of a key, -1 from `end` on.
CSP_DEVICE int key_modality(const ScoreArgs& a, const Head& head, int key, int end) {
  return key < end ? static_cast<int8_t>(
                         global<int8_t>(a.modality)[static_cast<int64_t>(head.batch) * a.keys + key])
                   : -1;
}

// The last key that a row sees, the padding apart.
CSP_DEVICE int last_key(const ScoreArgs& a, int row) {
  return a.causal ? a.keys - a.window + row / a.group : a.keys - 1;
}

// The first row that sees a key.
CSP_DEVICE int first_row(const ScoreArgs& a, int key) {
  const int query = key - (a.keys - a.window);
  return a.causal && query > 0 ? query * a.group : 0;
}

// ---- the normaliser of a row ----

// Maximum and sum of 2^(t - top) over some keys. `top` may lag behind the largest t by kSlack, so that it
// rarely moves.
struct RowSum {
  float top = kLowest;
  float sum = 0;
};

constexpr float kSlack = 32;

CSP_DEVICE RowSum add(const RowSum& a, const RowSum& b) {
  const float top = fmaxf(a.top, b.top);
  return {top, a.sum * exp2_approx(a.top - top) + b.sum * exp2_approx(b.top - top)};
}

// Over the lanes that differ in the bits of kFirst, 2 kFirst, ... up to kLast; each gets the result.
template <int kFirst, int kLast>
CSP_DEVICE RowSum reduce_lanes(RowSum row) {
  CSP_UNROLL
  for (int mask = kFirst; mask <= kLast; mask *= 2) {
    row = add(row, {shuffle_xor(row.top, mask), shuffle_xor(row.sum, mask)});
  }
  return row;
}

CSP_DEVICE RowSum load_row_sum(Global<const float> from) {
  const Vec<float, 2> pair = load_vec<2>(from);
  return {pair[0], pair[1]};
}
CSP_DEVICE void store_row_sum(Global<float> to, const RowSum& row) {
  store_vec(to, Vec<float, 2>{{row.top, row.sum}});
}

// log2(n + sum). A NaN in the sum goes on.
CSP_DEVICE float constant_of(const ScoreArgs& a, const RowSum& row) {
  const float top = fmaxf(row.top, a.log2_n);
  return top + log2_approx(row.sum * exp2_approx(row.top - top) + exp2_approx(a.log2_n - top));
}

// The modality of a row and its constant; -1 where it does not observe or sees nothing.
CSP_DEVICE int row_constant(const ScoreArgs& a, const Head& head, int row, float* constant) {
  *constant = 0;
  if (row >= a.rows) return -1;
  const int query = row / a.group, in_group = row - query * a.group;
  const int8_t modality =
      global<int8_t>(a.query_modality)[static_cast<int64_t>(head.batch) * a.window + query];
  if (modality < 0) return -1;
  RowSum sum;
  if (a.lse != nullptr) {
    const int64_t query_head = static_cast<int64_t>(a.first_head + head.in_launch) * a.group + in_group;
    const float lse = global<float>(a.lse)[query_head * a.window + query];
    sum = {lse * kLog2E, lse == -kInfinity ? 0.0f : 1.0f};
  } else {
    const Global<const float> from =
        global<float>(static_cast<const void*>(a.partials)) + partial_at(a, head, row, 0);
    // Several on their way at once.
    constexpr int kAtOnce = 8;
    for (int split = 0; split < a.splits; split += kAtOnce) {
      RowSum parts[kAtOnce];
      CSP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (split + i < a.splits) parts[i] = load_row_sum(from + 2 * (split + i));
      }
      CSP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) sum = add(sum, parts[i]);
    }
  }
  if (sum.sum == 0) return -1;
  // An lse of +inf leaves nothing of the row; inf - inf would make it NaN.
  *constant = a.lse != nullptr && sum.top == kInfinity ? kInfinity : constant_of(a, sum);
  return modality;
}

// ---- output ----

CSP_DEVICE int64_t column_at(const ScoreArgs& a, const Head& head, int key) {
  return (a.first_head + head.in_launch) * a.out_stride + key;
}

CSP_DEVICE void store_columns(const ScoreArgs& a, const Head& head, int key, int modality, float self,
                              float cross) {
  const int64_t at = column_at(a, head, key);
  // Padding gets 0, whatever its key held.
  global<float>(a.self)[at] = modality < 0 ? 0.0f : self * a.mean;
  global<float>(a.cross)[at] = modality < 0 ? 0.0f : cross * a.mean;
}

}  // namespace csp::score_kernels
