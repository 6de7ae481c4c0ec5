#pragma once

#include <utility>

#include "decode_kernel.h"
#include "simd.h"

// The inner loops of decode: one tile of slots against a block of at most eight query rows.

namespace csp::CSP_ISA {
namespace {

// ---- lanes ----

// R rows x C keys of logits share a vector: lane r * C + c, so that maxima and exponentials need no layout
// change.
constexpr int kMaxRows = kLanes < 8 ? kLanes : 8;
constexpr int keys_per_vector(int rows) {
  return rows == 1 ? kLanes : rows == 2 ? kLanes / 2 : rows <= 4 ? kLanes / 4 : kLanes / 8;
}

constexpr int interleave_lo(int i) {
  return i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes;
}
constexpr int pair_lo(int i) {
  return i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes;
}
constexpr int even_quad(int i) {
  return i / 4 * 8 + i % 4;
}
template <int kOffset, int (*kPick)(int), size_t... i>
CSP_INLINE vfloat pick(vfloat a, vfloat b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (kPick(i) + kOffset)...);
}
template <int kOffset, int (*kPick)(int)>
CSP_INLINE vfloat fold(vfloat a, vfloat b) {
  using Lanes = std::make_index_sequence<kLanes>;
  return pick<0, kPick>(a, b, Lanes{}) + pick<kOffset, kPick>(a, b, Lanes{});
}

// Lane i of the result is the sum of the lanes of v[i].
CSP_INLINE vfloat transposed_sum(vfloat* v) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) v[i] = fold<2, interleave_lo>(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 4; ++i) v[i] = fold<2, pair_lo>(v[2 * i], v[2 * i + 1]);
  if constexpr (kLanes >= 8) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 8; ++i) v[i] = fold<4, even_quad>(v[2 * i], v[2 * i + 1]);
  }
  if constexpr (kLanes >= 16) v[0] = fold<4, even_quad>(v[0], v[1]);
  return v[0];
}

template <int kDistance, size_t... i>
CSP_INLINE vfloat swapped(vfloat v, std::index_sequence<i...>) {
  return __builtin_shufflevector(v, v, (static_cast<int>(i) ^ kDistance)...);
}
// The maximum of each aligned group of kGroup lanes, in all of its lanes.
template <int kGroup>
CSP_INLINE vfloat group_max(vfloat v) {
  if constexpr (kGroup > 1) {
    v = vmax(v, swapped<kGroup / 2>(v, std::make_index_sequence<kLanes>{}));
    return group_max<kGroup / 2>(v);
  }
  return v;
}

// ---- one tile of one block of rows ----

template <typename T>
struct Tile {
  const T* key;
  const T* value;
  int64_t key_step;
  int64_t value_step;
  int64_t keys;      // slots of the tile, 1..kDecodeTile
  int64_t rest;      // slots from here to the end of the split, or 0: the tile is in cache
  int64_t ahead;     // rows from the one in use to the one being fetched
  int64_t head_dim;  // >= kLanes
  int64_t width;     // of a query and accumulator row
};

struct Block {
  const float* query;      // [R, width], scaled
  float* acc;              // [R, width]
  float* top;              // [kLanes]
  float* sum;              // [kLanes]
  float* logits;           // [kDecodeTile / C, kLanes]
  const int32_t* visible;  // [R] slots of the tile that each row sees
  bool first;              // of the tile: fetches the rows ahead
};

// NOTE: where head_dim is not whole vectors, the last one overlaps the one before; the lanes of queries and
// keys there are zero.
CSP_INLINE int64_t column_of(int64_t slot, int64_t head_dim) {
  return slot + kLanes <= head_dim ? slot : head_dim - kLanes;
}

template <typename T>
CSP_INLINE void fetch(const T* row, int64_t columns) {
  for (int64_t d = 0; d < columns; d += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + d, 0, 2);
}

template <int R, typename T>
CSP_INLINE void logits_of(const Block& block, const Tile<T>& t) {
  constexpr int C = keys_per_vector(R);
  // Keys read side by side. One row alone is bound by memory, which likes one stream best.
  constexpr int kStep = R < 3 && R < C ? R : C;
  const int64_t fetched = block.first ? t.rest : 0;
  for (int64_t j = 0; j < t.keys; j += C) {
    vfloat sums[kLanes] = {};
#pragma GCC unroll 16
    for (int c = 0; c < C; c += kStep) {
      const T* row[kStep];
#pragma GCC unroll 16
      for (int i = 0; i < kStep; ++i) {
        const int64_t slot = j + c + i < t.keys ? j + c + i : t.keys - 1;
        row[i] = t.key + slot * t.key_step;
        if (j + c + i + t.ahead < fetched) fetch(row[i] + t.ahead * t.key_step, t.head_dim);
      }
      const auto multiply = [&](int64_t d, const vfloat* key) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vfloat query = load(block.query + r * t.width + d);
#pragma GCC unroll 16
          for (int i = 0; i < kStep; ++i) sums[r * C + c + i] += query * key[i];
        }
      };
      vfloat key[kStep];
      const int64_t whole = t.head_dim / kLanes * kLanes;
      for (int64_t d = 0; d < whole; d += kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kStep; ++i) key[i] = load(row[i] + d);
        multiply(d, key);
      }
      if (whole < t.head_dim) {
        // Lanes that were multiplied already are zeroed: an infinite key times a query's zero is no number.
        const int64_t column = t.head_dim - kLanes;
        vint fresh{};
        for (int lane = 0; lane < kLanes; ++lane) fresh[lane] = column + lane >= whole ? -1 : 0;
#pragma GCC unroll 16
        for (int i = 0; i < kStep; ++i) key[i] = blend(fresh, load(row[i] + column), vfloat{});
        multiply(whole, key);
      }
    }
    store(block.logits + j / C * kLanes, transposed_sum(sums));
  }
}

// Logits to weights exp(x - top); returns the factor that the earlier tiles' sums shrink by.
template <int R>
CSP_INLINE vfloat softmax_of(const Block& block, int64_t keys) {
  constexpr int C = keys_per_vector(R);
  const int64_t vectors = (keys + C - 1) / C;
  vint limit{};
  vint slot{};
  for (int lane = 0; lane < kLanes; ++lane) {
    slot[lane] = lane % C;
    limit[lane] = lane < R * C ? block.visible[lane / C] : 0;
  }
  const vfloat before = load(block.top);
  vfloat top = before;
  for (int64_t i = 0; i < vectors; ++i, slot += C) {
    const vfloat x = blend(slot < limit, load(block.logits + i * kLanes), set1(-kInf));
    store(block.logits + i * kLanes, x);
    top = vmax(x, top);
  }
  top = group_max<C>(top);
  const vfloat shift = blend(top == set1(-kInf), vfloat{}, top);
  const vfloat shrink = vexp(before - shift);
  vfloat sum = load(block.sum) * shrink;
  for (int64_t i = 0; i < vectors; ++i) {
    const vfloat weight = vexp(load(block.logits + i * kLanes) - shift);
    sum += weight;
    store(block.logits + i * kLanes, weight);
  }
  store(block.top, top);
  store(block.sum, sum);
  return shrink;
}

// V vectors of the accumulators at `slot`, over the slots of the tile that every row sees.
template <int R, int V, typename T>
void weigh(const Block& block, const Tile<T>& t, int64_t keys, int64_t slot, const float* shrink) {
  constexpr int C = keys_per_vector(R);
  vfloat acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = load(block.acc + r * t.width + slot + v * kLanes) * shrink[r * C];
  }
  const T* value = t.value + column_of(slot, t.head_dim);
  // Where the tile takes several passes, each fetches its own columns of the next tile.
  const int64_t ahead = t.head_dim > V * kLanes ? kDecodeTile : t.ahead;
  const int64_t fetched = block.first ? t.rest : 0;
  for (int64_t j = 0; j < keys; j += C) {
    const float* weights = block.logits + j / C * kLanes;
    const int count = keys - j < C ? static_cast<int>(keys - j) : C;
    for (int c = 0; c < count; ++c, value += t.value_step) {
      vfloat x[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) x[v] = load(value + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] += x[v] * weights[r * C + c];
      }
      if (j + c + ahead < fetched) fetch(value + ahead * t.value_step, V * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(block.acc + r * t.width + slot + v * kLanes, acc[r][v]);
  }
}

// All columns from `slot` on: V vectors at a time, then half as many, at last the overlapping one.
template <int R, int V, typename T>
CSP_INLINE void weigh_all(const Block& block, const Tile<T>& t, int64_t keys, int64_t slot,
                          const float* shrink) {
  const int64_t end = V > 1 ? t.head_dim - V * kLanes : t.head_dim - 1;
  for (; slot <= end; slot += V * kLanes) weigh<R, V>(block, t, keys, slot, shrink);
  if constexpr (V > 1) weigh_all<R, V / 2>(block, t, keys, slot, shrink);
}

// The newest slots, which only the later queries see: never multiplied by a weight of zero, they may hold
// nan.
template <int R, typename T>
void weigh_newest(const Block& block, const Tile<T>& t, int64_t common) {
  constexpr int C = keys_per_vector(R);
  for (int r = 0; r < R; ++r) {
    for (int64_t j = common; j < block.visible[r]; ++j) {
      const float weight = block.logits[j / C * kLanes + r * C + j % C];
      for (int64_t d = 0; d < t.head_dim; d += kLanes) {
        float* acc = block.acc + r * t.width + d;
        store(acc, load(acc) + load(t.value + j * t.value_step + column_of(d, t.head_dim)) * weight);
      }
    }
  }
}

template <int R, typename T>
void tile_of(const Block& block, const Tile<T>& t, int64_t common) {
  logits_of<R>(block, t);
  float shrink[kLanes];
  store(shrink, softmax_of<R>(block, t.keys));

  // As many accumulators as fit the registers: 32 of them with AVX-512, otherwise 16.
  constexpr int kFit = (kLanes >= 16 ? 20 : 8) / R;
  constexpr int kWide = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  weigh_all<R, kWide>(block, t, common, 0, shrink);
  weigh_newest<R>(block, t, common);
}

template <typename T>
void tile_of(int rows, const Block& block, const Tile<T>& t, int64_t common) {
  switch (rows) {
    case 1:
      return tile_of<1>(block, t, common);
    case 2:
      return tile_of<2>(block, t, common);
    case 3:
      return tile_of<3>(block, t, common);
    case 4:
      return tile_of<4>(block, t, common);
  }
  if constexpr (kMaxRows == 8) {
    switch (rows) {
      case 5:
        return tile_of<5>(block, t, common);
      case 6:
        return tile_of<6>(block, t, common);
      case 7:
        return tile_of<7>(block, t, common);
      default:
        return tile_of<8>(block, t, common);
    }
  }
}

}  // namespace
}  // namespace csp::CSP_ISA
