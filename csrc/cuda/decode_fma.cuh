#pragma once

#include "decode.cuh"

// decode in plain float32: any dtype, head_dim and alignment. The lanes of a warp hold kColumns columns of
// the head each, the warps take turns at the slots.
namespace csp::simt {

// Pieces of kVec elements: piece i of a lane begins at column (32 i + lane) kVec.
template <typename T, int kVec, int kColumns>
CSP_DEVICE void load_row(Vec<T, kVec> (&x)[kColumns / kVec], Global<const T> row, int64_t columns) {
  CSP_UNROLL
  for (int i = 0; i < kColumns / kVec; ++i) {
    const int column = (32 * i + lane()) * kVec;
    if (column < columns) {
      x[i] = load_readonly<kVec>(row + column);
    } else {
      CSP_UNROLL
      for (int e = 0; e < kVec; ++e) x[i][e] = from_float<T>(0);
    }
  }
}

// Sums over the warp of kCount numbers at once: lane i gets that of x[i / (32 / kCount)].
template <int kCount>
CSP_DEVICE float transposed_sum(float (&x)[kCount]) {
  int mask = 16;
  CSP_UNROLL
  for (int half = kCount / 2; half > 0; half /= 2, mask /= 2) {
    const bool upper = (lane() & mask) != 0;
    CSP_UNROLL
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? x[i + half] : x[i], sent = upper ? x[i] : x[i + half];
      x[i] = kept + shuffle_xor(sent, mask);
    }
  }
  float sum = x[0];
  CSP_UNROLL
  for (; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

template <typename T, int kVec, int kColumns, int kRows>
CSP_KERNEL(kDecodeThreads, kVec > 1 && kColumns == 4 ? 3 : 2)
void decode_fma_kernel(const DecodeArguments a) {
  constexpr int kSlots = 32 / kColumns, kPieces = kColumns / kVec;  // 8 KiB of float32 at a time
  CSP_SHARED(float, tops, kRows* kDecodeWarps);
  CSP_SHARED(float, sums, kRows* kDecodeWarps);
  CSP_SHARED(float, outs, kDecodeWarps * kRows * 32 * kColumns);
  const DecodeParams& p = a.problem;
  const int queries_per_head = static_cast<int>(p.queries);
  const DecodeBlock at = decode_block(a, kRows);

  float query[kRows][kColumns], out[kRows][kColumns], top[kRows], sum[kRows];
  uint32_t hidden = 0;  // how many of the newest slots a row does not see, in four bits each
  CSP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = at.first_row + r, group = row / queries_per_head, i = row % queries_per_head;
    const int64_t head = at.head * (a.rows / queries_per_head) + group;
    Vec<T, kVec> x[kPieces];
    load_row<T, kVec, kColumns>(x,
                                global<T>(p.query) + at.batch * p.query_stride.batch +
                                    head * p.query_stride.head + i * p.query_stride.row,
                                r < at.rows ? p.head_dim : 0);
    CSP_UNROLL
    for (int e = 0; e < kColumns; ++e) {
      query[r][e] = to_float(x[e / kVec][e % kVec]) * a.scale_log2;
      out[r][e] = 0;
    }
    top[r] = -INFINITY;
    sum[r] = 0;
    hidden |= static_cast<uint32_t>(queries_per_head - 1 - i) << 4 * r;
  }

  const Global<const T> key = global<T>(p.key) + at.batch * p.key_stride.batch + at.head * p.key_stride.head;
  const Global<const T> value =
      global<T>(p.value) + at.batch * p.value_stride.batch + at.head * p.value_stride.head;
  const int64_t slots = at.end > at.begin ? at.end - at.begin : 0;
  const int64_t units = (slots + kSlots - 1) / kSlots;
  const int64_t last = first_unit(units, at.split + 1, a.splits);
  for (int64_t unit = first_unit(units, at.split, a.splits) + warp(); unit < last; unit += kDecodeWarps) {
    const int64_t slot = at.begin + unit * kSlots;
    const int count = static_cast<int>(at.end - slot < kSlots ? at.end - slot : kSlots);
    Vec<T, kVec> k[kSlots][kPieces], v[kSlots][kPieces];
    CSP_UNROLL
    for (int j = 0; j < kSlots; ++j) {
      load_row<T, kVec, kColumns>(k[j], key + (slot + j) * p.key_stride.row, j < count ? p.head_dim : 0);
    }
    CSP_UNROLL
    for (int j = 0; j < kSlots; ++j) {
      load_row<T, kVec, kColumns>(v[j], value + (slot + j) * p.value_stride.row, j < count ? p.head_dim : 0);
    }
    const int rest = static_cast<int>(at.end - slot < 64 ? at.end - slot : 64);
    CSP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= at.rows) break;
      const int seen = rest - static_cast<int>(hidden >> 4 * r & 15u);
      float dots[kSlots];
      CSP_UNROLL
      for (int j = 0; j < kSlots; ++j) {
        dots[j] = 0;
        CSP_UNROLL
        for (int e = 0; e < kColumns; ++e) dots[j] += query[r][e] * to_float(k[j][e / kVec][e % kVec]);
      }
      // This lane's slot is lane / kColumns from here on.
      float x = transposed_sum(dots);
      x = lane() / kColumns < seen ? x : -INFINITY;
      float peak = fmaxf(top[r], x);
      CSP_UNROLL
      for (int mask = 16; mask >= kColumns; mask /= 2) peak = fmaxf(peak, shuffle_xor(peak, mask));
      const float shift = peak == -INFINITY ? 0 : peak;
      const float shrink = exp2_approx(top[r] - shift), weight = exp2_approx(x - shift);
      top[r] = peak;
      sum[r] = sum[r] * shrink + weight;
      CSP_UNROLL
      for (int e = 0; e < kColumns; ++e) out[r][e] *= shrink;
      CSP_UNROLL
      for (int j = 0; j < kSlots; ++j) {
        const float each = shuffle(weight, j * kColumns);
        if (j >= seen) continue;  // its value may be NaN
        CSP_UNROLL
        for (int e = 0; e < kColumns; ++e) out[r][e] += each * to_float(v[j][e / kVec][e % kVec]);
      }
    }
  }

  CSP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float total = sum[r];
    CSP_UNROLL
    for (int mask = 16; mask >= kColumns; mask /= 2) total += shuffle_xor(total, mask);
    if (lane() == 0) {
      tops[r * kDecodeWarps + warp()] = top[r];
      sums[r * kDecodeWarps + warp()] = total;
    }
    CSP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      Vec<float, kVec> piece;
      CSP_UNROLL
      for (int e = 0; e < kVec; ++e) piece[e] = out[r][i * kVec + e];
      store_vec(Shared<float>(outs) + (warp() * kRows + r) * 32 * kColumns + (32 * i + lane()) * kVec, piece);
    }
  }
  finish_block<T>(a, at, Shared<const float>(tops), Shared<const float>(sums), Shared<const float>(outs),
                  kRows * 32 * kColumns, 32 * kColumns);
}

}  // namespace csp::simt
