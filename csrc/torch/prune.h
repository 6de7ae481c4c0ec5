#pragma once

#include "compact.h"
#include "csp/prune.h"
#include "score.h"
#include "select_options.h"

// Shared by prune and prune_: one function checks the arguments and fills the params of score and select.

namespace csp {

// The params, and the tensors that must outlive them. The params of compact are left to the caller.
struct PruneInputs {
  PruneParams params;
  ScoreInputs of_score;
  Tensor indices;
  Tensor lengths;

  // Makes the results of select.
  void allocate(const char* op, const Tensor& key) {
    SelectParams& select = params.select;
    indices = empty(op, key, {select.batch, select.score_heads, select.budget}, ScalarType::Int);
    lengths = empty(op, key, {select.batch, select.score_heads}, ScalarType::Int);
    select.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    select.lengths = static_cast<int32_t*>(lengths.mutable_data_ptr());
  }
};

inline PruneInputs fill_prune_params(const char* op, const Tensor& query, const Tensor& key,
                                     const Tensor& value, const Tensor& modality,
                                     const std::optional<Tensor>& query_modality, double n,
                                     std::optional<double> scale, const std::string& heads,
                                     const std::optional<Tensor>& lse, const SelectOptions& options) {
  PruneInputs inputs;
  inputs.of_score =
      fill_score_params(op, query, key, modality, query_modality, n, scale, heads, options.causal, lse);
  check_compact(op, key, value);

  const ScoreParams& score = inputs.params.score = inputs.of_score.params;
  SelectParams& select = inputs.params.select;
  select.dtype = accumulate_dtype(score.dtype);
  select.batch = score.batch;
  select.score_heads = inputs.of_score.score_heads();
  select.keys = score.keys;
  select.window = score.window;
  select.modality = score.modality;
  select.query_modality = score.query_modality;
  fill_options(op, options, select.window, select);
  return inputs;
}

}  // namespace csp
