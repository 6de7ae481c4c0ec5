#pragma once

#include <algorithm>

#include "csp/prune.h"
#include "support.h"

// What the tests of prune and prune_in_place share.
namespace csp::test {

struct PruneSizes {
  int64_t batch = 2, num_heads = 4, num_kv_heads = 2, window = 9, keys = 150, head_dim = 32, value_dim = 48,
          budget = 40;
};

// One problem on the device, and the outputs of one way to solve it.
struct PruneProblem {
  PruneSizes sizes;
  int64_t score_heads;
  DeviceBuffer query, key, value, modality, window, lse;
  DeviceBuffer indices, lengths, key_out, value_out;
  PruneParams params;

  PruneProblem(DType type, Heads heads, PruneSizes s = {}, bool with_lse = false)
      : sizes(s),
        score_heads(heads == Heads::kShared ? 1 : s.num_kv_heads),
        query(random("query", type, s.batch * s.num_heads * s.window * s.head_dim, 1)),
        key(random("key", type, s.batch * s.num_kv_heads * s.keys * s.head_dim, 2)),
        value(random("value", type, s.batch * s.num_kv_heads * s.keys * s.value_dim, 3)),
        modality(modalities("modality", s.batch * s.keys, 11)),
        window(modalities("query_modality", s.batch * s.window, 5)),
        lse(random("lse", DType::kFloat32, s.batch * s.num_heads * s.window, 4)),
        indices("indices", bytes(s.batch * score_heads * s.budget, sizeof(int32_t))),
        lengths("lengths", bytes(s.batch * score_heads, sizeof(int32_t))),
        key_out("key_out", bytes(s.batch * s.num_kv_heads * s.budget * s.head_dim, dtype_bytes(type))),
        value_out("value_out", bytes(s.batch * s.num_kv_heads * s.budget * s.value_dim, dtype_bytes(type))) {
    fill_score(type, heads, with_lse);
    fill_select();
    fill_compact();
  }

  PruneProblem(const PruneProblem&) = delete;

 private:
  static size_t bytes(int64_t count, int64_t each) { return static_cast<size_t>(count * each); }
  static DeviceBuffer random(const char* name, DType type, int64_t count, uint32_t seed) {
    return to_device(name, Buffer::random(type, static_cast<size_t>(count), seed));
  }
  // Text and images in runs, every `hole`th token padding.
  static DeviceBuffer modalities(const char* name, int64_t count, int64_t hole) {
    std::vector<int8_t> ids(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) ids[i] = static_cast<int8_t>(i % hole == 0 ? -1 : i % 7 < 4);
    return to_device(name, ids);
  }

  void fill_score(DType type, Heads heads, bool with_lse) {
    ScoreParams& p = params.score;
    p.dtype = type;
    p.query = query.data();
    p.query_stride = {sizes.num_heads * sizes.window * sizes.head_dim, sizes.window * sizes.head_dim,
                      sizes.head_dim};
    p.key = key.data();
    p.key_stride = {sizes.num_kv_heads * sizes.keys * sizes.head_dim, sizes.keys * sizes.head_dim,
                    sizes.head_dim};
    p.modality = static_cast<const int8_t*>(modality.data());
    p.query_modality = static_cast<const int8_t*>(window.data());
    if (with_lse) p.lse = lse.data();
    p.batch = sizes.batch;
    p.num_heads = sizes.num_heads;
    p.num_kv_heads = sizes.num_kv_heads;
    p.window = sizes.window;
    p.keys = sizes.keys;
    p.head_dim = sizes.head_dim;
    p.scale = 0.25;
    p.heads = heads;
  }

  void fill_select() {
    SelectParams& p = params.select;
    p.modality = params.score.modality;
    p.query_modality = params.score.query_modality;
    p.indices = static_cast<int32_t*>(indices.data());
    p.lengths = static_cast<int32_t*>(lengths.data());
    p.batch = sizes.batch;
    p.score_heads = score_heads;
    p.keys = sizes.keys;
    p.window = sizes.window;
    p.budget = sizes.budget;
    p.recent = std::min(sizes.window, sizes.budget);
    p.pool = Pool::kMax;
    p.combine = Combine::kCalibrated;
  }

  void fill_compact() {
    CompactParams& p = params.compact;
    p.element_bytes = dtype_bytes(params.score.dtype);
    p.key = key.data();
    p.value = value.data();
    p.key_stride = params.score.key_stride;
    p.value_stride = {sizes.num_kv_heads * sizes.keys * sizes.value_dim, sizes.keys * sizes.value_dim,
                      sizes.value_dim};
    p.indices = params.select.indices;
    p.key_out = key_out.data();
    p.value_out = value_out.data();
    p.batch = sizes.batch;
    p.num_kv_heads = sizes.num_kv_heads;
    p.score_heads = score_heads;
    p.keys = sizes.keys;
    p.budget = sizes.budget;
    p.head_dim = sizes.head_dim;
    p.value_dim = sizes.value_dim;
  }
};

// score and select, with lists and scratch of their own for each.
inline void choose_by_parts(const PruneProblem& problem, const CudaDevice& device) {
  PruneParams p = problem.params;
  const auto list =
      static_cast<size_t>(p.select.batch * p.select.score_heads * p.select.keys) * sizeof(float);
  const DeviceBuffer self("self", list), cross("cross", list);
  p.score.self = self.data();
  p.score.cross = cross.data();
  p.select.self = self.data();
  p.select.cross = cross.data();
  const Launch score(device, score_cuda_workspace_bytes(p.score, device));
  expect_ok(score_cuda(p.score, score.context()));
  const Launch select(device, select_cuda_workspace_bytes(p.select, device));
  expect_ok(select_cuda(p.select, select.context()));
  problem.lengths.bytes_now();  // the lists and the scratch must outlive the kernels
}

}  // namespace csp::test
