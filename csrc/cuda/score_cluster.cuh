#pragma once

#include "reduce.cuh"
#include "score_mma.cuh"

// score of few rows on tensor cores, in one pass: the blocks of a cluster share the keys of a head, each
// keeps its logits in registers while the row sums are put together, and the keys are read once.
namespace csp::score_kernels {

template <int kRows>
struct ClusterShape {
  static constexpr int kUnits = cluster_units(kRows), kStages = cluster_stages(kRows);
};

// Over the eight lanes that hold the same rows.
template <typename Op>
CSP_DEVICE float reduce_row_lanes(float value, Op op) {
  CSP_UNROLL
  for (int mask = 4; mask <= 16; mask *= 2) value = op(value, shuffle_xor(value, mask));
  return value;
}

// Of `kRows` rows (the padded number), a warp takes cluster_units units of 16 keys, those of a block's warps
// interleaved. Each warp copies its own keys, so no barrier holds it up.
template <typename T, int kDim, int kRows>
CSP_KERNEL(kClusterThreads, 2)
void score_cluster(const ScoreArgs a) {
  constexpr int kWarps = kClusterThreads / 32, kUnits = ClusterShape<kRows>::kUnits,
                kStages = ClusterShape<kRows>::kStages;
  constexpr int kUnitElements = kScoreStep * kDim, kUnitKeys = kWarps * kScoreStep;
  constexpr int kRowTiles = kRows / 8;
  const int warp = simt::warp();
  SharedArena arena;
  const Shared<T> queries = arena.take<T>(kRows * kDim);
  const Shared<T> stages = arena.take<T>(kStages * kWarps * kUnitElements);
  const Shared<float> sums = arena.take<float>(kWarps * kRows * 2);  // [warp, row, top and sum]
  const Shared<int8_t> my_modality = arena.take<int8_t>(kUnits * kUnitKeys) + warp * kUnits * kScoreStep;
  const RowTable table{arena.take<float>(kRows), arena.take<int8_t>(kRows),
                       arena.take<int8_t>(kRows / kScoreStep)};

  const int split = block_in_head();
  const Head head = head_of_rows(a);
  const int begin = split * a.split_keys;
  const int left = a.keys - begin;
  const int end = left < a.split_keys ? a.keys : begin + a.split_keys;
  const int my_first = begin + warp * kScoreStep;
  const Global<const T> keys = keys_of<T>(a, head);
  const Shared<T> my_stages = stages + warp * kStages * kUnitElements;
  const auto copy_unit = [&](int unit) {
    const int first = my_first + unit * kUnitKeys;
    if (unit < kUnits && first < end) {
      copy_keys<kDim, 32>(a, my_stages + unit % kStages * kUnitElements, keys, first, kScoreStep, end,
                          lane());
    }
    copy_async_commit();
  };

  copy_queries<kDim>(a, queries, queries_of<T>(a, head), 0, kRows);
  copy_async_commit();
  CSP_UNROLL
  for (int unit = 0; unit < kStages; ++unit) copy_unit(unit);
  CSP_UNROLL
  for (int unit = 0; unit < kUnits; unit += 2) {
    const int first = my_first + (unit + lane() / 16) * kUnitKeys;
    my_modality[unit * 16 + lane()] = static_cast<int8_t>(key_modality(a, head, first + lane() % 16, end));
  }
  copy_async_wait<kStages>();
  sync_block();

  // The row of accumulator e of row tile n.
  const auto row_at = [](int n, int e) { return 8 * n + lane() % 4 * 2 + e % 2; };

  // This lane holds keys g and g + 8 of each unit, g = lane / 4, of rows 8 n + 2 (lane % 4) and the next.
  float t[kUnits][kRowTiles][4];
  CSP_UNROLL
  for (int unit = 0; unit < kUnits; ++unit) {
    const int first = my_first + unit * kUnitKeys;
    CSP_UNROLL
    for (int n = 0; n < kRowTiles; ++n) {
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) t[unit][n][e] = 0;
    }
    copy_async_wait<kStages - 1>();
    sync_warp();
    const int8_t modality = my_modality[unit * 16 + lane() % 16];
    const uint32_t real = ballot(modality >= 0) & 0xffffu;
    if (real != 0) {
      const Shared<T> unit_keys = my_stages + unit % kStages * kUnitElements;
      CSP_UNROLL
      for (int step = 0; step < kDim / 16; ++step) {
        uint32_t k[4];
        load_fragments<kDim, true>(k, unit_keys, 0, step);
        CSP_UNROLL
        for (int n = 0; n < kRowTiles; n += 2) {
          uint32_t q[4];
          load_fragments<kDim, false>(q, queries, 8 * n, step);
          mma_m16n8k16<T>(t[unit][n], k, q[0], q[1]);
          mma_m16n8k16<T>(t[unit][n + 1], k, q[2], q[3]);
        }
      }
      sync_warp();
    }
    copy_unit(unit + kStages);
    CSP_UNROLL
    for (int n = 0; n < kRowTiles; ++n) {
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) t[unit][n][e] *= a.scale;
    }
    if (real != 0xffffu || first_row(a, first + kScoreStep - 1) > 0) {
      CSP_UNROLL
      for (int n = 0; n < kRowTiles; ++n) {
        CSP_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int k = e / 2 * 8 + lane() / 4;
          if ((real >> k & 1) == 0 || row_at(n, e) < first_row(a, first + k)) t[unit][n][e] = -kInfinity;
        }
      }
    }
  }
  copy_async_wait<0>();

  // The sum of each row over the keys of the warp; what is kept from here on is 2^(t - top).
  CSP_UNROLL
  for (int n = 0; n < kRowTiles; ++n) {
    CSP_UNROLL
    for (int e = 0; e < 2; ++e) {
      float top = kLowest, sum = 0;
      CSP_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) top = fmaxf(top, fmaxf(t[unit][n][e], t[unit][n][e + 2]));
      top = reduce_row_lanes(top, Max());
      CSP_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) {
        t[unit][n][e] = exp2_approx(t[unit][n][e] - top);
        t[unit][n][e + 2] = exp2_approx(t[unit][n][e + 2] - top);
        sum += t[unit][n][e] + t[unit][n][e + 2];
      }
      sum = reduce_row_lanes(sum, Add());
      if (lane() / 4 == 0) {
        store_vec(sums + 2 * (warp * kRows + row_at(n, e)), Vec<float, 2>{{top, sum}});
      }
    }
  }
  sync_block();
  if (thread() < a.rows) {
    RowSum row;
    CSP_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      const Vec<float, 2> part = load_vec<2>(sums + 2 * (w * kRows + thread()));
      row = add(row, {part[0], part[1]});
    }
    store_row_sum(global<float>(a.partials) + partial_at(a, head, thread(), split), row);
  }
  sync_cluster();
  fill_rows<kClusterThreads>(a, head, table, 0, 0, kRows);
  sync_block();

  // 2^(top - c) makes P of what was kept.
  float weight[kRowTiles][2];
  CSP_UNROLL
  for (int n = 0; n < kRowTiles; ++n) {
    CSP_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float top = sums[2 * (warp * kRows + row_at(n, e))];
      weight[n][e] = exp2_approx(top - table.constant[row_at(n, e)]);
    }
  }
  CSP_UNROLL
  for (int unit = 0; unit < kUnits; ++unit) {
    const int first = my_first + unit * kUnitKeys;
    if (first >= end) continue;
    int modality[2];
    CSP_UNROLL
    for (int k = 0; k < 2; ++k)
      modality[k] = static_cast<int8_t>(my_modality[unit * kScoreStep + 8 * k + lane() / 4]);
    float self[2] = {}, cross[2] = {};
    CSP_UNROLL
    for (int n = 0; n < kRowTiles; n += 2) {
      const int common = table.common[n / 2];
      const bool all_see = first_row(a, first + kScoreStep - 1) <= 8 * n;
      CSP_UNROLL
      for (int k = 0; k < 2; ++k) {
        float p[4];
        CSP_UNROLL
        for (int r = 0; r < 4; ++r) p[r] = t[unit][n + r / 2][2 * k + r % 2] * weight[n + r / 2][r % 2];
        if (common >= 0 && all_see) {
          const float sum = (p[0] + p[1]) + (p[2] + p[3]);
          self[k] += common == modality[k] ? sum : 0.0f;
          cross[k] += common == modality[k] ? 0.0f : sum;
        } else {
          CSP_UNROLL
          for (int r = 0; r < 4; ++r) {
            const int row = row_at(n + r / 2, r);
            const int row_modality = static_cast<int8_t>(table.modality[row]);
            const bool sees = row_modality >= 0 && row >= first_row(a, first + 8 * k + lane() / 4);
            const bool same = row_modality == modality[k];
            self[k] += sees && same ? p[r] : 0.0f;
            cross[k] += sees && !same ? p[r] : 0.0f;
          }
        }
      }
    }
    // Of the four lanes that share two keys, each stores one of the four sums.
    float mine = 0;
    CSP_UNROLL
    for (int i = 0; i < 4; ++i) {
      float sum = i < 2 ? self[i] : cross[i - 2];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane() % 4 == i) mine = sum;
    }
    const int k = lane() % 2, key = first + 8 * k + lane() / 4;
    if (key < end) {
      const Global<float> out = global<float>(lane() % 4 < 2 ? a.self : a.cross);
      const bool real = (k == 0 ? modality[0] : modality[1]) >= 0;
      out[column_at(a, head, key)] = real ? mine * a.mean : 0.0f;
    }
  }
}

}  // namespace csp::score_kernels
