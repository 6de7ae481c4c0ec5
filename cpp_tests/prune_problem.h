#pragma once

#include "csp/prune.h"
#include "support.h"

// What the tests of prune and prune_in_place share.
namespace csp::test {

// One problem, its inputs, and the outputs of one way to solve it.
struct PruneProblem {
  static constexpr int64_t kBatch = 2, kHeads = 4, kWindow = 9, kKeys = 150, kDim = 16, kBudget = 40;
  DType dtype;
  int64_t score_heads;
  Buffer query, key, value;
  std::vector<int8_t> modality, window;
  std::vector<int32_t> indices, lengths;
  Buffer key_out, value_out;
  PruneParams params;

  PruneProblem(DType type, Heads heads)
      : dtype(type),
        score_heads(heads == Heads::kShared ? 1 : 2),
        query(Buffer::random(type, kBatch * kHeads * kWindow * kDim, 1)),
        key(Buffer::random(type, kBatch * 2 * kKeys * kDim, 2)),
        value(Buffer::random(type, kBatch * 2 * kKeys * kDim, 3)),
        modality(kBatch * kKeys),
        window(kBatch * kWindow),
        indices(kBatch * score_heads * kBudget),
        lengths(kBatch * score_heads),
        key_out(type, kBatch * 2 * kBudget * kDim),
        value_out(type, kBatch * 2 * kBudget * kDim) {
    for (size_t i = 0; i < modality.size(); ++i) modality[i] = static_cast<int8_t>(i % 7 < 4) - (i % 11 == 0);
    for (size_t i = 0; i < window.size(); ++i) window[i] = static_cast<int8_t>(i % 2);
    fill_score(heads);
    fill_select();
    fill_compact();
  }

  PruneProblem(const PruneProblem&) = delete;

 private:
  void fill_score(Heads heads) {
    ScoreParams& p = params.score;
    p.dtype = dtype;
    p.query = query.data();
    p.query_stride = {kHeads * kWindow * kDim, kWindow * kDim, kDim};
    p.key = key.data();
    p.key_stride = {2 * kKeys * kDim, kKeys * kDim, kDim};
    p.modality = modality.data();
    p.query_modality = window.data();
    p.batch = kBatch;
    p.num_heads = kHeads;
    p.num_kv_heads = 2;
    p.window = kWindow;
    p.keys = kKeys;
    p.head_dim = kDim;
    p.scale = 0.25;
    p.heads = heads;
  }

  void fill_select() {
    SelectParams& p = params.select;
    p.dtype = accumulate_dtype(dtype);
    p.modality = modality.data();
    p.query_modality = window.data();
    p.indices = indices.data();
    p.lengths = lengths.data();
    p.batch = kBatch;
    p.score_heads = score_heads;
    p.keys = kKeys;
    p.window = kWindow;
    p.budget = kBudget;
    p.recent = kWindow;
    p.pool = Pool::kMax;
  }

  void fill_compact() {
    CompactParams& p = params.compact;
    p.element_bytes = dtype_bytes(dtype);
    p.key = key.data();
    p.value = value.data();
    p.key_stride = p.value_stride = params.score.key_stride;
    p.indices = indices.data();
    p.key_out = key_out.data();
    p.value_out = value_out.data();
    p.batch = kBatch;
    p.num_kv_heads = 2;
    p.score_heads = score_heads;
    p.keys = kKeys;
    p.budget = kBudget;
    p.head_dim = p.value_dim = kDim;
  }
};

// score and select, with lists and scratch of their own for each.
inline void choose_by_parts(PruneProblem& problem) {
  PruneParams p = problem.params;
  const auto scores = static_cast<size_t>(p.select.batch * p.select.score_heads * p.select.keys);
  Buffer self(p.select.dtype, scores), cross(p.select.dtype, scores);
  p.score.self = self.data();
  p.score.cross = cross.data();
  p.select.self = self.data();
  p.select.cross = cross.data();
  const Workspace score_scratch(score_cpu_workspace_bytes(p.score, 1));
  score_cpu(p.score, score_scratch.get());
  const Workspace select_scratch(select_cpu_workspace_bytes(p.select, 1));
  select_cpu(p.select, select_scratch.get());
}

}  // namespace csp::test
