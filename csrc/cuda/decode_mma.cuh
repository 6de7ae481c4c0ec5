#pragma once

#include "decode.cuh"

// decode on tensor cores: 16 query rows of a KV head against its slots, 16 at a time.
//
// Each warp takes every fourth unit of 16 slots through a ring of its own, with no barrier of the block: one
// row of queries or sixteen, the bound is memory, and what counts is how much of it is on its way.
namespace csp::simt {

template <typename T, int kDim>
struct DecodeMma {
  static constexpr int kSlots = 16;
  static constexpr int kRows = static_cast<int>(kDecodeMmaRows);
  static constexpr int kSteps = kDim / 16;
  // An odd number of 16-byte pieces per row: no two of eight rows meet in a bank.
  static constexpr int kStride = kDim + 8;
  static constexpr int kTile = kSlots * kStride;
  // 64 KiB of keys and values per block, so that three blocks fit a multiprocessor of sm_90 and two of sm_80.
  static constexpr int kStages = 256 / kDim < 1 ? 1 : 256 / kDim > 4 ? 4 : 256 / kDim;
  static constexpr int kRing = 2 * kStages * kTile;       // elements per warp
  static constexpr int kBatch = kSteps < 4 ? kSteps : 4;  // matrices loaded before the first is multiplied
  static constexpr int64_t kSharedBytes =
      (kRows * kStride + kDecodeWarps * kRing) * 2 + 2 * kRows * kDecodeWarps * 4;
  static_assert(kSharedBytes <= 99 << 10, "some devices have no more");
  static_assert(kRing * 2 >= kRows * kStride * 4, "the ring holds the warp's result at the end");
  // Weights are in [0, 2^kBias]. In fp16 they need the room: 1 is only 2^24 above its smallest number.
  static constexpr float kBias = std::is_same_v<T, Half> ? 15 : 0;
  static constexpr float kUnit = std::is_same_v<T, Half> ? 0x1p-15f : 1;  // 2^-kBias
  // What clears the bits of a float that T has no place for, and a weight so small that no result shows it.
  static constexpr uint32_t kHighBits = std::is_same_v<T, Half> ? 0xffffe000u : 0xffff0000u;
  static constexpr float kTiny = std::is_same_v<T, Half> ? 0x1p-24f : 0x1p-126f;
};

// 16 slots of a warp, zeros beyond `slots` and beyond the head.
template <typename T, int kDim>
CSP_DEVICE void copy_slots(Shared<T> tile, Global<const T> from, int64_t stride, int64_t slots,
                           int64_t head_dim) {
  constexpr int kPieces = kDim / 8;
  CSP_UNROLL
  for (int i = 0; i < kPieces / 2; ++i) {
    const int piece = 32 * i + lane(), slot = piece / kPieces, column = piece % kPieces * 8;
    copy_async(tile + slot * DecodeMma<T, kDim>::kStride + column, from + slot * stride + column,
               slot < slots && column < head_dim);
  }
}

// s = q k^T: s[i] has the slots 8 i + c and the next one of rows g (0, 1) and g + 8 (2, 3), for g = lane / 4
// and c = 2 (lane % 4).
template <typename T, int kDim>
CSP_DEVICE void multiply_keys(float (&s)[2][4], Shared<const T> queries, Shared<const T> keys) {
  using Cut = DecodeMma<T, kDim>;
  const Shared<const T> query_row = queries + lane() % 16 * Cut::kStride + lane() / 16 * 8;
  const Shared<const T> key_row = keys + (lane() % 8 + lane() / 16 * 8) * Cut::kStride + lane() / 8 % 2 * 8;
  float odd[2][4] = {};  // every other step: half as long a chain
  CSP_UNROLL
  for (int first = 0; first < Cut::kSteps; first += Cut::kBatch) {
    uint32_t q[Cut::kBatch][4], k[Cut::kBatch][4];
    CSP_UNROLL
    for (int i = 0; i < Cut::kBatch; ++i) {
      if (first + i >= Cut::kSteps) break;
      ldmatrix(q[i], query_row + 16 * (first + i));
      ldmatrix(k[i], key_row + 16 * (first + i));
    }
    CSP_UNROLL
    for (int i = 0; i < Cut::kBatch; ++i) {
      if (first + i >= Cut::kSteps) break;
      CSP_UNROLL
      for (int j = 0; j < 2; ++j) {
        mma_m16n8k16<T>(i % 2 == 0 ? s[j] : odd[j], q[i], k[i][2 * j], k[i][2 * j + 1]);
      }
    }
  }
  CSP_UNROLL
  for (int j = 0; j < 2; ++j) {
    CSP_UNROLL
    for (int e = 0; e < 4; ++e) s[j][e] += odd[j][e];
  }
}

// The running softmax of rows g (0) and g + 8 (1): the maximum of all slots so far, this lane's share of the
// sum.
struct DecodeRows {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
};

// Products to weights 2^(x - top + bias) of the first seen[i] slots; shrink: what earlier weights are to be
// multiplied by.
CSP_DEVICE void soften(float (&s)[2][4], const int (&seen)[2], float scale, float bias, DecodeRows& rows,
                       float (&shrink)[2]) {
  const int slot = 2 * (lane() % 4);
  CSP_UNROLL
  for (int i = 0; i < 2; ++i) {
    float top = rows.top[i];
    CSP_UNROLL
    for (int e = 0; e < 4; ++e) {
      float& x = s[e / 2][2 * i + e % 2];
      x = e / 2 * 8 + slot + e % 2 < seen[i] ? x * scale : -INFINITY;
      top = fmaxf(top, x);
    }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    const float shift = top == -INFINITY ? 0 : top;
    shrink[i] = exp2_approx(rows.top[i] - shift);
    rows.top[i] = top;
    rows.sum[i] *= shrink[i];
    CSP_UNROLL
    for (int e = 0; e < 4; ++e) {
      float& x = s[e / 2][2 * i + e % 2];
      x = exp2_approx(x - shift + bias);
      rows.sum[i] += x;
    }
  }
}

// out += p v. A weight goes in as the sum of two 16-bit numbers: rounded to one, its error would be as large
// as the output's own rounding, and larger where values cancel. Neither part is zero but where the weight is,
// so that an infinite value gives an infinite sum and no NaN.
template <typename T, int kDim>
CSP_DEVICE void multiply_values(float (&out)[kDim / 8][4], const float (&p)[2][4], Shared<const T> values) {
  using Cut = DecodeMma<T, kDim>;
  uint32_t high[4], low[4];
  CSP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float x = p[i / 2][i % 2 * 2], y = p[i / 2][i % 2 * 2 + 1];
    const float high_x = bits_float(float_bits(x) & Cut::kHighBits);
    const float high_y = bits_float(float_bits(y) & Cut::kHighBits);
    high[i] = pack2<T>(high_x, high_y);
    low[i] = pack2<T>(fmaxf(x - high_x, Cut::kTiny), fmaxf(y - high_y, Cut::kTiny));
  }
  const Shared<const T> row = values + lane() % 16 * Cut::kStride + lane() / 16 * 8;
  CSP_UNROLL
  for (int first = 0; first < Cut::kSteps; first += Cut::kBatch) {
    uint32_t v[Cut::kBatch][4];
    CSP_UNROLL
    for (int i = 0; i < Cut::kBatch; ++i) {
      if (first + i < Cut::kSteps) ldmatrix_transposed(v[i], row + 16 * (first + i));
    }
    CSP_UNROLL
    for (int part = 0; part < 2; ++part) {
      CSP_UNROLL
      for (int i = 0; i < 2 * Cut::kBatch; ++i) {
        if (first + i / 2 >= Cut::kSteps) break;
        mma_m16n8k16<T>(out[2 * first + i], part == 0 ? high : low, v[i / 2][i % 2 * 2],
                        v[i / 2][i % 2 * 2 + 1]);
      }
    }
  }
}

// The same for at most seven slots that not all rows see: what a row does not see may be NaN, so it is not
// even multiplied by a weight of zero.
template <typename T, int kDim>
CSP_DEVICE void multiply_newest(float (&out)[kDim / 8][4], const float (&p)[2][4], const int (&seen)[2],
                                int slots, Shared<const T> values) {
  for (int slot = 0; slot < slots; ++slot) {
    const int owner = lane() / 4 * 4 + slot / 2;
    const float x = shuffle(slot % 2 == 0 ? p[0][0] : p[0][1], owner);
    const float y = shuffle(slot % 2 == 0 ? p[0][2] : p[0][3], owner);
    const Shared<const T> row = values + slot * DecodeMma<T, kDim>::kStride + 2 * (lane() % 4);
    CSP_UNROLL
    for (int i = 0; i < kDim / 8; ++i) {
      const Vec<T, 2> v = load_vec<2>(row + 8 * i);
      CSP_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (slot < seen[0]) out[i][e] += x * to_float(v[e]);
        if (slot < seen[1]) out[i][2 + e] += y * to_float(v[e]);
      }
    }
  }
}

template <typename T, int kDim>
CSP_KERNEL(kDecodeThreads, kDim <= 128 ? 3 : 2)
void decode_mma_kernel(const DecodeArguments a) {
  using Cut = DecodeMma<T, kDim>;
  constexpr int kPending = 2 * Cut::kStages - 1;  // copies on their way while the oldest is waited for
  const DecodeParams& p = a.problem;
  const int queries_per_head = static_cast<int>(p.queries);
  const DecodeBlock at = decode_block(a, Cut::kRows);
  SharedArena arena;
  const Shared<T> queries = arena.take<T>(Cut::kRows * Cut::kStride);
  const Shared<T> rings = arena.take<T>(kDecodeWarps * Cut::kRing);
  const Shared<float> tops = arena.take<float>(Cut::kRows * kDecodeWarps);
  const Shared<float> sums = arena.take<float>(Cut::kRows * kDecodeWarps);

  // The queries travel with the first keys, and are asked for while start and end are on their way.
  const Global<const T> query = global<T>(p.query) + at.batch * p.query_stride.batch +
                                at.head * (a.rows / queries_per_head) * p.query_stride.head;
  for (int piece = thread(); piece < Cut::kRows * kDim / 8; piece += kDecodeThreads) {
    const int row = piece / (kDim / 8), column = piece % (kDim / 8) * 8, from = at.first_row + row;
    copy_async(queries + row * Cut::kStride + column,
               query + from / queries_per_head * p.query_stride.head +
                   from % queries_per_head * p.query_stride.row + column,
               row < at.rows && column < p.head_dim);
  }

  // Units of 16 slots that all queries see, and at last one of the newest slots.
  const int64_t newest = at.common > at.begin ? at.common : at.begin;
  const int64_t whole = (newest - at.begin + Cut::kSlots - 1) / Cut::kSlots;
  const int64_t units = whole + (newest < at.end ? 1 : 0);
  const int64_t last = first_unit(units, at.split + 1, a.splits);
  int64_t unit = first_unit(units, at.split, a.splits) + warp();
  const auto first_slot = [&](int64_t u) { return u < whole ? at.begin + u * Cut::kSlots : newest; };
  const auto slots_of = [&](int64_t u) { return (u < whole ? at.common : at.end) - first_slot(u); };

  const Shared<T> ring = rings + warp() * Cut::kRing;
  const Global<const T> key = global<T>(p.key) + at.batch * p.key_stride.batch + at.head * p.key_stride.head;
  const Global<const T> value =
      global<T>(p.value) + at.batch * p.value_stride.batch + at.head * p.value_stride.head;
  const auto copy_keys = [&](int64_t u, int stage) {
    if (u < last) {
      copy_slots<T, kDim>(ring + 2 * stage * Cut::kTile, key + first_slot(u) * p.key_stride.row,
                          p.key_stride.row, slots_of(u), p.head_dim);
    }
    copy_async_commit();
  };
  const auto copy_values = [&](int64_t u, int stage) {
    if (u < last) {
      copy_slots<T, kDim>(ring + (2 * stage + 1) * Cut::kTile, value + first_slot(u) * p.value_stride.row,
                          p.value_stride.row, slots_of(u), p.head_dim);
    }
    copy_async_commit();
  };

  CSP_UNROLL
  for (int stage = 0; stage < Cut::kStages; ++stage) {
    copy_keys(unit + stage * kDecodeWarps, stage);
    copy_values(unit + stage * kDecodeWarps, stage);
  }
  copy_async_wait<kPending>();
  sync_block();

  float out[kDim / 8][4] = {};
  DecodeRows rows;
  const int row = lane() / 4;
  const bool worked = unit < last;
  for (int stage = 0; unit < last; unit += kDecodeWarps, stage = stage + 1 == Cut::kStages ? 0 : stage + 1) {
    const Shared<T> keys = ring + 2 * stage * Cut::kTile, values = keys + Cut::kTile;
    const int slots = static_cast<int>(slots_of(unit) < Cut::kSlots ? slots_of(unit) : Cut::kSlots);
    int seen[2] = {slots, slots};
    if (unit >= whole) {
      // The row of query i sees Q - 1 - i slots less than the last one.
      CSP_UNROLL
      for (int i = 0; i < 2; ++i) {
        seen[i] -= queries_per_head - 1 - (at.first_row + row + 8 * i) % queries_per_head;
      }
    }
    copy_async_wait<kPending>();
    sync_warp();
    float s[2][4] = {};
    multiply_keys<T, kDim>(s, Shared<const T>(queries), Shared<const T>(keys));
    sync_warp();
    copy_keys(unit + Cut::kStages * kDecodeWarps, stage);

    float shrink[2];
    soften(s, seen, a.scale_log2, Cut::kBias, rows, shrink);
    CSP_UNROLL
    for (int i = 0; i < kDim / 8; ++i) {
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) out[i][e] *= shrink[e / 2];
    }
    copy_async_wait<kPending>();
    sync_warp();
    if (unit < whole) {
      multiply_values<T, kDim>(out, s, Shared<const T>(values));
    } else {
      multiply_newest<T, kDim>(out, s, seen, slots, Shared<const T>(values));
    }
    sync_warp();
    copy_values(unit + Cut::kStages * kDecodeWarps, stage);
  }
  copy_async_wait<0>();

  // Into the ring, which is empty now. Rows of kStride floats keep half a warp's pairs out of each other's
  // way.
  const Shared<float> result = as<float>(ring);
  CSP_UNROLL
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane() % 4 == 0) {
      tops[(row + 8 * i) * kDecodeWarps + warp()] = rows.top[i];
      sums[(row + 8 * i) * kDecodeWarps + warp()] = sum * Cut::kUnit;
    }
    if (worked && row + 8 * i < at.rows) {
      CSP_UNROLL
      for (int j = 0; j < kDim / 8; ++j) {
        const Vec<float, 2> pair{{out[j][2 * i] * Cut::kUnit, out[j][2 * i + 1] * Cut::kUnit}};
        store_vec(result + (row + 8 * i) * Cut::kStride + 8 * j + 2 * (lane() % 4), pair);
      }
    }
  }
  finish_block<T>(a, at, Shared<const float>(tops), Shared<const float>(sums),
                  Shared<const float>(as<float>(rings)), Cut::kRing / 2, Cut::kStride);
}

}  // namespace csp::simt
