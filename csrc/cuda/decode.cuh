#pragma once

#include <cmath>

#include "decode_plan.h"
#include "reduce.cuh"
#include "simt.cuh"

// What the decode kernels share: where a block works, and how the results of warps and splits become one.
namespace csp::simt {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;

struct DecodeArguments {
  DecodeParams problem;
  int rows;       // query rows that share a KV head
  int row_tiles;  // blocks that these rows take
  int splits;
  bool clustered;
  float scale_log2;  // scale * log2 e: logits are powers of two
  float log2_n;
  // The results of the splits: [B Hkv rows, splits] and [B Hkv rows, splits, head_dim].
  float* tops;
  float* sums;
  float* outs;
};

// A block: some rows of one (batch, KV head) against one split of its slots.
struct DecodeBlock {
  int64_t batch;
  int64_t head;  // KV head
  int split;
  int first_row;
  int rows;       // of this block
  int64_t index;  // of the first row in out and lse
  // The slots [begin, end); all queries see those below common, query i the next i too.
  int64_t begin;
  int64_t common;
  int64_t end;
};

CSP_DEVICE DecodeBlock decode_block(const DecodeArguments& a, int tile) {
  const DecodeParams& p = a.problem;
  const auto block = static_cast<uint32_t>(block_x());  // < 2^31
  const uint32_t group = block / static_cast<uint32_t>(a.splits);
  const uint32_t pair = group / static_cast<uint32_t>(a.row_tiles);
  DecodeBlock at;
  at.batch = pair / static_cast<uint32_t>(p.num_kv_heads);
  at.head = pair % static_cast<uint32_t>(p.num_kv_heads);
  at.split = static_cast<int>(block % static_cast<uint32_t>(a.splits));
  at.first_row = static_cast<int>(group % static_cast<uint32_t>(a.row_tiles)) * tile;
  at.rows = a.rows - at.first_row < tile ? a.rows - at.first_row : tile;
  at.index = static_cast<int64_t>(pair) * a.rows + at.first_row;
  int32_t start = 0;
  if (p.start != nullptr) start = global<int32_t>(p.start)[at.batch * p.start_batch + at.head * p.start_head];
  at.end = p.capacity;
  if (p.end != nullptr) {
    const int32_t end = global<int32_t>(p.end)[0];
    at.end = end < p.capacity ? end : p.capacity;
  }
  at.begin = start > 0 ? start : 0;
  at.common = at.end - p.queries + 1;
  return at;
}

// Where a split begins among the units of a row: all splits get the same number, or one more.
CSP_DEVICE int64_t first_unit(int64_t units, int split, int splits) {
  const auto all = static_cast<uint32_t>(units), each = all / static_cast<uint32_t>(splits);
  const uint32_t more = all % static_cast<uint32_t>(splits), before = static_cast<uint32_t>(split);
  return int64_t{each} * before + (before < more ? before : more);
}

// ---- merging ----

// The softmax of some slots for one row, and one column of its product with the values: both relative to
// 2^top. Where nothing was seen top is -inf, the sum is 0 and out is not read. A NaN logit shows in the sum.
struct DecodePart {
  float top;
  float sum;
  float out;
};

// By a warp, in the order of the parts: each lane merges its own column, out[i * stride] of part i.
template <typename Pointer>
CSP_DEVICE DecodePart merge_parts(Pointer tops, Pointer sums, Pointer out, int64_t stride, int parts,
                                  bool in_row) {
  float top = -INFINITY;
  for (int i = lane(); i < parts; i += 32) top = fmaxf(top, tops[i]);
  top = reduce_warp(top, Max());
  const float shift = top == -INFINITY ? 0 : top;
  float sum = 0, total = 0;
  for (int first = 0; first < parts; first += 32) {
    float factor = 0;
    if (first + lane() < parts) {
      factor = exp2_approx(tops[first + lane()] - shift);
      sum += factor * sums[first + lane()];
    }
    const int count = parts - first < 32 ? parts - first : 32;
    for (int i = 0; i < count; ++i) {
      const float weight = shuffle(factor, i);
      if (in_row && weight != 0) total += weight * out[(first + i) * stride];
    }
  }
  sum = reduce_warp(sum, Add());
  return {top, sum, total};
}

// softmax * sigmoid(lse - log n) in one division; n 2^-shift as 2^(log2 n - shift), else a tiny n is 0 * inf.
template <typename T>
CSP_DEVICE void write_row(const DecodeArguments& a, int64_t row, int column, const DecodePart& part) {
  constexpr float kLn2 = 0.6931471805599453f;
  const float shift = part.top == -INFINITY ? 0 : part.top;
  if (column < a.problem.head_dim) {
    const float x = part.sum == 0 ? 0 : part.out / (part.sum + exp2_approx(a.log2_n - shift));
    global<T>(a.problem.out)[row * a.problem.head_dim + column] = from_float<T>(x);
  }
  if (column == 0) global<float>(a.problem.lse)[row] = (shift + log2_approx(part.sum)) * kLn2;
}

// One row of the splits' results, 32 columns.
template <typename T>
CSP_DEVICE void merge_splits(const DecodeArguments& a, int64_t row, int column) {
  const int64_t head_dim = a.problem.head_dim;
  const Global<const float> tops = global<float>(a.tops) + row * a.splits;
  const Global<const float> sums = global<float>(a.sums) + row * a.splits;
  const Global<const float> outs = global<float>(a.outs) + row * a.splits * head_dim + column;
  write_row<T>(a, row, column, merge_parts(tops, sums, outs, head_dim, a.splits, column < head_dim));
}

// The end of a block: its warps' results, tops and sums [rows, warps], become one, and those of a cluster's
// splits become the row.
template <typename T>
CSP_DEVICE void finish_block(const DecodeArguments& a, const DecodeBlock& at, Shared<const float> tops,
                             Shared<const float> sums, Shared<const float> outs, int64_t warp_stride,
                             int64_t row_stride) {
  const int64_t head_dim = a.problem.head_dim;
  const int chunks = static_cast<int>((head_dim + 31) / 32), items = at.rows * chunks;
  sync_block();
  for (int item = warp(); item < items; item += kDecodeWarps) {
    const int row = item / chunks, column = item % chunks * 32 + lane();
    const DecodePart part =
        merge_parts(tops + row * kDecodeWarps, sums + row * kDecodeWarps, outs + row * row_stride + column,
                    warp_stride, kDecodeWarps, column < head_dim);
    if (a.splits == 1) {
      write_row<T>(a, at.index + row, column, part);
      continue;
    }
    const int64_t to = (at.index + row) * a.splits + at.split;
    if (column == 0) {
      global<float>(a.tops)[to] = part.top;
      global<float>(a.sums)[to] = part.sum;
    }
    if (column < head_dim && part.top != -INFINITY) global<float>(a.outs)[to * head_dim + column] = part.out;
  }
  if (!a.clustered) return;
  sync_cluster();
  for (int item = at.split * kDecodeWarps + warp(); item < items; item += a.splits * kDecodeWarps) {
    merge_splits<T>(a, at.index + item / chunks, item % chunks * 32 + lane());
  }
}

// A warp for each row and 32 columns.
template <typename T>
CSP_KERNEL(kDecodeThreads, 4)
void decode_combine_kernel(const DecodeArguments a, int64_t items) {
  const int64_t chunks = (a.problem.head_dim + 31) / 32;
  const int64_t item = block_x() * kDecodeWarps + warp();
  if (item < items) merge_splits<T>(a, item / chunks, static_cast<int>(item % chunks) * 32 + lane());
}

}  // namespace csp::simt
