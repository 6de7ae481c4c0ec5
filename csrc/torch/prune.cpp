#include "prune.h"

#include <tuple>

namespace csp {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> prune(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& modality, int64_t budget,
    std::optional<int64_t> recent, const std::optional<Tensor>& query_modality, double n,
    std::optional<double> scale, std::string heads, bool causal, const std::optional<Tensor>& lse,
    double cross_ratio, std::string combine, std::optional<int64_t> k_self, std::optional<int64_t> k_cross,
    std::string pool, int64_t pool_kernel) {
  constexpr const char* op = "prune";
  PruneInputs inputs =
      fill_prune_params(op, query, key, value, modality, query_modality, n, scale, heads, lse,
                        {budget, recent, cross_ratio, combine, k_self, k_cross, pool, pool_kernel, causal});
  inputs.allocate(op, key);
  const Tensor& indices = inputs.indices;
  Tensor key_out = empty_compacted(op, key, budget);
  Tensor value_out = empty_compacted(op, value, budget);
  inputs.params.compact = fill_compact_params(key, value, indices, key_out, value_out);
  launch(op, {{"query", query}, {"key", key}, {"indices", indices}}, inputs.params, CSP_LAUNCHER(prune),
         CSP_WORKSPACE(prune));
  return {key_out, value_out, indices, inputs.lengths};
}

}  // namespace
}  // namespace csp

CSP_IMPL(prune)
