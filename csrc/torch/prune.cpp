#include "csp/prune.h"

#include <tuple>

#include "compact.h"
#include "score.h"
#include "select_options.h"

namespace csp {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> prune(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& modality, int64_t budget,
    std::optional<int64_t> recent, const std::optional<Tensor>& query_modality, double n,
    std::optional<double> scale, std::string heads, bool causal, const std::optional<Tensor>& lse,
    double cross_ratio, std::string combine, std::optional<int64_t> k_self, std::optional<int64_t> k_cross,
    std::string pool, int64_t pool_kernel) {
  constexpr const char* op = "prune";
  const ScoreInputs inputs =
      fill_score_params(op, query, key, modality, query_modality, n, scale, heads, causal, lse);
  check_compact(op, key, value);

  PruneParams params;
  params.score = inputs.params;
  SelectParams& select = params.select;
  select.dtype = accumulate_dtype(params.score.dtype);
  select.batch = params.score.batch;
  select.score_heads = inputs.score_heads();
  select.keys = params.score.keys;
  select.window = params.score.window;
  select.modality = params.score.modality;
  select.query_modality = params.score.query_modality;
  fill_options(op, {budget, recent, cross_ratio, combine, k_self, k_cross, pool, pool_kernel, causal},
               select.window, select);

  Tensor indices = empty(op, key, {select.batch, select.score_heads, budget}, ScalarType::Int);
  Tensor lengths = empty(op, key, {select.batch, select.score_heads}, ScalarType::Int);
  Tensor key_out = empty_compacted(op, key, budget);
  Tensor value_out = empty_compacted(op, value, budget);
  select.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  select.lengths = static_cast<int32_t*>(lengths.mutable_data_ptr());
  params.compact = fill_compact_params(key, value, indices, key_out, value_out);
  launch(op, {{"query", query}, {"key", key}, {"indices", indices}}, params, CSP_LAUNCHER(prune),
         CSP_WORKSPACE(prune));
  return {key_out, value_out, indices, lengths};
}

}  // namespace
}  // namespace csp

CSP_IMPL(prune)
