#pragma once

#include "score.cuh"

// score on tensor cores, in two passes. Both keep 32 rows of one operand in the registers of a warp and let
// the other stream through shared memory, 16 rows at a step:
//   first:  queries stay, keys stream:  the normaliser of each query,
//   second: keys stay, queries stream:  the column sums.
namespace csp::score_kernels {

// ---- tiles of rows in shared memory ----

// Row r of a tile is kDim elements; its 16-byte chunks are permuted so that eight rows at one chunk lie in
// different banks, whatever kDim.
template <int kDim>
struct Tile {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kPhases = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  static constexpr int kKeyTile = mma_key_tile(kDim), kQueryTile = mma_query_tile(kDim);
  // Neighbouring threads that copy one row.
  static constexpr int kLanes = kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;

  static CSP_DEVICE int permute(unsigned row) { return static_cast<int>(row / (8 / kPhases) % kPhases); }
  static CSP_DEVICE int at(int row, int chunk) { return row * kDim + (chunk ^ permute(row)) * 8; }
};

// Which row and chunk of a 16 x 16 block this lane names to ldmatrix. `kStationary`: as the left operand of
// mma_m16n8k16, otherwise as the right operands of two.
template <bool kStationary>
CSP_DEVICE int fragment_row() {
  return kStationary ? lane() % 16 : lane() / 16 * 8 + lane() % 8;
}
template <bool kStationary>
CSP_DEVICE int fragment_chunk() {
  return kStationary ? lane() / 16 : lane() / 8 % 2;
}

// Fragments of the 16 rows from `row` on, a multiple of 8, at dims 16 step.. + 16.
template <int kDim, bool kStationary, typename T>
CSP_DEVICE void load_fragments(uint32_t (&out)[4], Shared<T> tile, int row, int step) {
  const int in_block = Tile<kDim>::at(fragment_row<kStationary>(), 2 * step + fragment_chunk<kStationary>());
  ldmatrix(out, tile + (row * kDim + in_block));
}

// Keys first .. first + count - 1 of a head, zeros from `end` on; this is thread `me` of kThreads that copy.
template <int kDim, int kThreads, typename T>
CSP_DEVICE void copy_keys(const ScoreArgs& a, Shared<T> to, Global<const T> keys, int first, int count,
                          int end, int me) {
  using Rows = Tile<kDim>;
  constexpr int kStride = kThreads / Rows::kLanes;
  const int chunk = me % Rows::kLanes;
  const bool in_dim = 8 * chunk < a.head_dim;
  if (chunk >= Rows::kChunks) return;
  const int mine = me / Rows::kLanes;
  Global<const T> from = keys + ((first + mine) * a.key_stride.row + 8 * chunk);
  CSP_UNROLL
  for (int base = 0; base < count; base += kStride) {
    copy_async(to + Rows::at(base + mine, chunk), from, in_dim && first + base + mine < end);
    from += kStride * a.key_stride.row;
  }
}

// Rows of the query matrix, zeros past its end.
template <int kDim, typename T>
CSP_DEVICE void copy_queries(const ScoreArgs& a, Shared<T> to, Global<const T> queries, int first,
                             int count) {
  using Rows = Tile<kDim>;
  constexpr int kStride = kMmaThreads / Rows::kLanes;
  const int chunk = thread() % Rows::kLanes;
  const bool in_dim = 8 * chunk < a.head_dim;
  if (chunk >= Rows::kChunks) return;
  // One division here, none in the loop.
  int row = thread() / Rows::kLanes;
  int query = (first + row) / a.group, in_group = first + row - query * a.group;
  const int more_queries = kStride / a.group, more_in_group = kStride - more_queries * a.group;
  for (; row < count; row += kStride) {
    const int64_t at = query * a.query_stride.row + in_group * a.query_stride.head + 8 * chunk;
    copy_async(to + Rows::at(row, chunk), queries + at, in_dim && first + row < a.rows);
    query += more_queries;
    in_group += more_in_group;
    if (in_group >= a.group) {
      in_group -= a.group;
      ++query;
    }
  }
}

// d += stationary [32, D] times the 16 rows of `tile` from `row` on, transposed.
template <typename T, int kDim>
CSP_DEVICE void multiply(float (&d)[2][2][4], const uint32_t (&stationary)[2][kDim / 16][4], Shared<T> tile,
                         int row) {
  CSP_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t b[4];
    load_fragments<kDim, false>(b, tile, row, step);
    CSP_UNROLL
    for (int m = 0; m < 2; ++m) {
      mma_m16n8k16<T>(d[m][0], stationary[m][step], b[0], b[1]);
      mma_m16n8k16<T>(d[m][1], stationary[m][step], b[2], b[3]);
    }
  }
}

// warp(), in a way that the compiler sees to be the same in every lane, so that it costs no register of each.
CSP_DEVICE int uniform_warp() {
  return shuffle(warp(), 0);
}

// ---- first pass ----

// A block: a row tile of a head and one split of its keys. Its warps are a grid of row_warps x key_warps, as
// the number of rows allows; the sums of the key_warps are added at the end.
template <typename T, int kDim>
CSP_KERNEL(kMmaThreads, kDim <= 128 ? 2 : 1)
void score_rows_mma(const ScoreArgs a) {
  constexpr int kWarps = kMmaThreads / 32, kTile = Tile<kDim>::kKeyTile, kSteps = kTile / kScoreStep;
  constexpr int kTileElements = kTile * kDim, kWords = kTile / 32;
  SharedArena arena;
  const Shared<T> stages = arena.take<T>(kMmaStages * kTileElements);
  const Shared<float> sums = arena.take<float>(kMmaThreads * 2);
  const Shared<uint32_t> real_keys = arena.take<uint32_t>(2 * kWords);  // a bit for each key of two tiles

  const int split = block_in_head() % a.splits, row_tile = block_in_head() / a.splits;
  const Head head = head_of_rows(a);
  const int first = row_tile * a.tile_rows;
  const int count = a.rows - first < a.tile_rows ? a.rows - first : a.tile_rows;

  const int warp_rows = (count + kScoreStationary - 1) / kScoreStationary;
  const int row_warps = warp_rows > 4 ? 8 : warp_rows > 2 ? 4 : warp_rows;
  const int key_warps = kWarps / row_warps < kSteps ? kWarps / row_warps : kSteps;
  const int me = uniform_warp(), row_warp = me % row_warps, key_warp = me / row_warps;
  const int my_first = first + row_warp * kScoreStationary;
  const bool busy = row_warp < warp_rows && key_warp < key_warps;

  // Keys that some row of the block sees.
  const int begin = split * a.split_keys;
  const int seen = last_key(a, first + count - 1) + 1;
  const int end = seen - begin < a.split_keys ? seen : begin + a.split_keys;
  const int tiles = end > begin ? (end - begin + kTile - 1) / kTile : 0;
  const Global<const T> keys = keys_of<T>(a, head);
  const auto copy_tile = [&](int tile) {
    if (tile < tiles) {
      copy_keys<kDim, kMmaThreads>(a, stages + tile % kMmaStages * kTileElements, keys, begin + tile * kTile,
                                   kTile, end, thread());
    }
    copy_async_commit();
  };

  // The queries pass through the last one or two stages on their way to the registers.
  const bool wide = count > kTile;
  const Shared<T> queries = stages + (wide ? 1 : 2) * kTileElements;
  copy_queries<kDim>(a, queries, queries_of<T>(a, head), first, warp_rows * kScoreStationary);
  copy_async_commit();
  copy_tile(0);
  if (wide) {
    copy_async_wait<1>();
  } else {
    copy_tile(1);
    copy_async_wait<2>();
  }
  sync_block();
  uint32_t q[2][kDim / 16][4] = {};
  if (busy) {
    CSP_UNROLL
    for (int step = 0; step < kDim / 16; ++step) {
      CSP_UNROLL
      for (int m = 0; m < 2; ++m) {
        load_fragments<kDim, true>(q[m][step], queries, row_warp * kScoreStationary + 16 * m, step);
      }
    }
  }
  if (wide) {
    sync_block();
    copy_tile(1);
  }

  // This lane holds rows g, g + 8, g + 16 and g + 24 of its warp, g = lane / 4.
  RowSum rows[4];
  // Of the next tile, warp w looks at keys 32 w.. + 32.
  const auto load_modality = [&](int tile) {
    return warp() < kWords ? key_modality(a, head, begin + tile * kTile + thread(), end) : -1;
  };
  const auto store_modality = [&](int tile, int modality) {
    const uint32_t bits = ballot(modality >= 0);
    if (warp() < kWords && lane() == 0) real_keys[tile % 2 * kWords + warp()] = bits;
  };
  store_modality(0, load_modality(0));
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<kMmaStages - 2>();
    sync_block();
    copy_tile(tile + kMmaStages - 1);
    const int next_modality = load_modality(tile + 1);
    for (int step = busy ? key_warp : kSteps; step < kSteps; step += key_warps) {
      const uint32_t word = real_keys[tile % 2 * kWords + step / 2];
      const uint32_t bits = word >> (step % 2 * 16) & 0xffffu;
      if (bits == 0) continue;
      float t[2][2][4] = {};
      multiply<T, kDim>(t, q, stages + tile % kMmaStages * kTileElements, step * kScoreStep);
      CSP_UNROLL
      for (int m = 0; m < 2; ++m) {
        CSP_UNROLL
        for (int n = 0; n < 2; ++n) {
          CSP_UNROLL
          for (int e = 0; e < 4; ++e) t[m][n][e] *= a.scale;
        }
      }
      const int key = begin + tile * kTile + step * kScoreStep;
      if (bits != 0xffffu || first_row(a, key + kScoreStep - 1) > my_first) {
        CSP_UNROLL
        for (int n = 0; n < 2; ++n) {
          CSP_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int k = 8 * n + lane() % 4 * 2 + e % 2;
            const int from = (bits >> k & 1) != 0 ? first_row(a, key + k) : a.rows;
            CSP_UNROLL
            for (int m = 0; m < 2; ++m) {
              if (my_first + 16 * m + e / 2 * 8 + lane() / 4 < from) t[m][n][e] = -kInfinity;
            }
          }
        }
      }
      float top[4];
      bool raise = false;
      CSP_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float (&x)[2][4] = t[r / 2];
        const int e = r % 2 * 2;
        top[r] = fmaxf(fmaxf(x[0][e], x[0][e + 1]), fmaxf(x[1][e], x[1][e + 1]));
        raise |= top[r] > rows[r].top + kSlack;
      }
      if (any(raise)) {
        CSP_UNROLL
        for (int r = 0; r < 4; ++r) rows[r] = add(rows[r], {top[r], 0});
      }
      CSP_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float (&x)[2][4] = t[r / 2];
        const int e = r % 2 * 2;
        const float shift = rows[r].top;
        rows[r].sum += (exp2_approx(x[0][e] - shift) + exp2_approx(x[0][e + 1] - shift)) +
                       (exp2_approx(x[1][e] - shift) + exp2_approx(x[1][e + 1] - shift));
      }
    }
    store_modality(tile + 1, next_modality);
  }
  copy_async_wait<0>();

  if (busy) {
    CSP_UNROLL
    for (int r = 0; r < 4; ++r) {
      const RowSum row = reduce_lanes<1, 2>(rows[r]);
      if (lane() % 4 == 0) {
        const int at = (key_warp * row_warps + row_warp) * kScoreStationary + r * 8 + lane() / 4;
        store_vec(sums + 2 * at, Vec<float, 2>{{row.top, row.sum}});
      }
    }
  }
  sync_block();
  if (thread() < count) {
    RowSum row;
    for (int w = 0; w < key_warps; ++w) {
      const Vec<float, 2> part = load_vec<2>(sums + 2 * (w * row_warps * kScoreStationary + thread()));
      row = add(row, {part[0], part[1]});
    }
    store_row_sum(global<float>(a.partials) + partial_at(a, head, first + thread(), split), row);
  }
}

// ---- second pass ----

// Constants and modalities of the rows that the second pass is at, and what the 16 rows of a step have in
// common: a modality, -1 (nothing to do) or kMixed.
struct RowTable {
  Shared<float> constant;
  Shared<int8_t> modality;
  Shared<int8_t> common;
};

// Puts rows first .. first + count - 1, a multiple of 16, into the table from `place` on; by all threads of
// the block.
template <int kThreads>
CSP_DEVICE void fill_rows(const ScoreArgs& a, const Head& head, const RowTable& table, int place, int first,
                          int count) {
  for (int base = 0; base < count; base += kThreads) {
    const int i = base + thread();
    float constant = 0;
    const int modality = i < count ? row_constant(a, head, first + i, &constant) : -1;
    const uint32_t same = ballot(modality == shuffle(modality, lane() & 16)) >> (lane() & 16) & 0xffffu;
    if (i < count) {
      table.constant[place + i] = constant;
      table.modality[place + i] = static_cast<int8_t>(modality);
      if (lane() % 16 == 0) {
        table.common[(place + i) / 16] = static_cast<int8_t>(same == 0xffffu ? modality : kMixed);
      }
    }
  }
}

// Column sums of the four keys of a lane: g, g + 8, g + 16 and g + 24 of its warp, g = lane / 4. Rows of one
// modality add up in registers until another comes, the rest is in shared memory, where each thread has its
// own places.
struct ColumnSums {
  static constexpr int kCross = 4 * kMmaThreads;
  Shared<float> mine;                 // key k: self at k * kMmaThreads, cross kCross further on
  Shared<const int8_t> key_modality;  // key k: at 8 k
  float run[4] = {};
  int run_modality = -1;

  CSP_DEVICE void add(int k, float p, bool same) { mine[k * kMmaThreads + (same ? 0 : kCross)] += p; }
  CSP_DEVICE bool is_own(int k, int modality) const {
    return static_cast<int8_t>(key_modality[8 * k]) == modality;
  }
  CSP_DEVICE void flush() {
    CSP_UNROLL
    for (int k = 0; k < 4; ++k) {
      add(k, run[k], is_own(k, run_modality));
      run[k] = 0;
    }
  }
};

// A block: key_warps * 32 keys of a head, against all rows that see one of them. Its warps are a grid of
// key_warps x row_warps; the sums of the row_warps are added at the end.
template <typename T, int kDim>
CSP_KERNEL(kMmaThreads, kDim <= 128 ? 2 : 1)
void score_columns_mma(const ScoreArgs a) {
  constexpr int kWarps = kMmaThreads / 32, kTile = Tile<kDim>::kQueryTile, kSteps = kTile / kScoreStep;
  const int tile_keys = a.key_warps * kScoreStationary;
  SharedArena arena;
  const Shared<T> key_tile = arena.take<T>(tile_keys * kDim);
  const Shared<T> stages = arena.take<T>(2 * kTile * kDim);
  const Shared<int8_t> modality = arena.take<int8_t>(tile_keys);
  const Shared<float> slots = arena.take<float>(8 * kMmaThreads);  // [self and cross, key of a lane, thread]
  const RowTable table{arena.take<float>(kMmaConstantRows), arena.take<int8_t>(kMmaConstantRows),
                       arena.take<int8_t>(kMmaConstantRows / kScoreStep)};

  const Head head = head_of_columns(a);
  const int first_key = block_in_head() * tile_keys;
  const int row_warps = kWarps / a.key_warps < kSteps ? kWarps / a.key_warps : kSteps;
  const int key_warp = warp() % a.key_warps, row_warp = warp() / a.key_warps;
  const int my_keys = first_key + key_warp * kScoreStationary;

  const int my_modality = thread() < tile_keys ? key_modality(a, head, first_key + thread(), a.keys) : -1;
  if (thread() < tile_keys) modality[thread()] = static_cast<int8_t>(my_modality);
  if (!sync_block_any(my_modality >= 0)) {
    if (thread() < tile_keys && first_key + thread() < a.keys) {
      store_columns(a, head, first_key + thread(), -1, 0, 0);
    }
    return;
  }
  const Global<const T> queries = queries_of<T>(a, head);
  const int begin = first_row(a, first_key) / kTile * kTile;
  const auto copy_tile = [&](int row) {
    if (row < a.rows) {
      const int left = (a.rows - row + kScoreStep - 1) / kScoreStep * kScoreStep;
      copy_queries<kDim>(a, stages + row / kTile % 2 * (kTile * kDim), queries, row,
                         left < kTile ? left : kTile);
    }
    copy_async_commit();
  };
  // Row r of the table is row r % kMmaConstantRows.
  const auto fill_table = [&](int row) {
    const int place = row % kMmaConstantRows, room = kMmaConstantRows - place;
    const int left = (a.rows - row + kScoreStep - 1) / kScoreStep * kScoreStep;
    fill_rows<kMmaThreads>(a, head, table, place, row, left < room ? left : room);
  };
  copy_keys<kDim, kMmaThreads>(a, key_tile, keys_of<T>(a, head), first_key, tile_keys, a.keys, thread());
  copy_tile(begin);

  const int all = first_row(a, my_keys + kScoreStationary - 1);  // the first row that sees the warp's keys
  ColumnSums sums{slots + thread(), modality + key_warp * kScoreStationary + lane() / 4};
  CSP_UNROLL
  for (int k = 0; k < 8; ++k) sums.mine[k * kMmaThreads] = 0.0f;
  uint32_t k_fragments[2][kDim / 16][4] = {};
  for (int row = begin; row < a.rows; row += kTile) {
    if (row == begin || row % kMmaConstantRows == 0) {
      sync_block();
      fill_table(row);
    }
    copy_async_wait<0>();
    sync_block();
    if (row == begin) {
      CSP_UNROLL
      for (int step = 0; step < kDim / 16; ++step) {
        CSP_UNROLL
        for (int m = 0; m < 2; ++m) {
          load_fragments<kDim, true>(k_fragments[m][step], key_tile, key_warp * kScoreStationary + 16 * m,
                                     step);
        }
      }
    }
    copy_tile(row + kTile);
    for (int step = row_warp; step < kSteps; step += row_warps) {
      const int step_row = row + step * kScoreStep;
      const int at = step_row % kMmaConstantRows;
      if (step_row >= a.rows) break;
      const int common = table.common[at / kScoreStep];
      if (common == -1) continue;
      float t[2][2][4] = {};
      multiply<T, kDim>(t, k_fragments, stages + row / kTile % 2 * (kTile * kDim), step * kScoreStep);
      CSP_UNROLL
      for (int n = 0; n < 2; ++n) {
        const Vec<float, 2> constant = load_vec<2>(table.constant + at + 8 * n + lane() % 4 * 2);
        CSP_UNROLL
        for (int m = 0; m < 2; ++m) {
          CSP_UNROLL
          for (int e = 0; e < 4; ++e) t[m][n][e] = exp2_approx(fmaf(t[m][n][e], a.scale, -constant[e % 2]));
        }
      }
      if (common >= 0 && step_row >= all) {
        if (common != sums.run_modality) {
          sums.flush();
          sums.run_modality = common;
        }
        CSP_UNROLL
        for (int k = 0; k < 4; ++k) {
          const float (&p)[2][4] = t[k / 2];
          const int e = k % 2 * 2;
          sums.run[k] += (p[0][e] + p[0][e + 1]) + (p[1][e] + p[1][e + 1]);
        }
      } else {
        CSP_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int from = first_row(a, my_keys + 8 * k + lane() / 4) - step_row;
          float self = 0, cross = 0;
          CSP_UNROLL
          for (int r = 0; r < 4; ++r) {
            const int in_step = r / 2 * 8 + lane() % 4 * 2 + r % 2;
            const int row_modality = static_cast<int8_t>(table.modality[at + in_step]);
            const float p = row_modality >= 0 && in_step >= from ? t[k / 2][r / 2][k % 2 * 2 + r % 2] : 0.0f;
            const bool own = sums.is_own(k, row_modality);
            self += own ? p : 0.0f;
            cross += own ? 0.0f : p;
          }
          sums.add(k, self, true);
          sums.add(k, cross, false);
        }
      }
    }
  }
  sums.flush();
  copy_async_wait<0>();
  sync_block();

  // A key's sums lie with four lanes of each of the warps that share it.
  const int key = my_keys + lane();
  if (row_warp == 0 && key < a.keys) {
    float self = 0, cross = 0;
    for (int first = key_warp * 32; first < kMmaThreads; first += tile_keys) {
      CSP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = lane() / 8 * kMmaThreads + first + lane() % 8 * 4 + i;
        self += slots[at];
        cross += slots[at + ColumnSums::kCross];
      }
    }
    store_columns(a, head, key, static_cast<int8_t>(modality[key_warp * 32 + lane()]), self, cross);
  }
}

}  // namespace csp::score_kernels
