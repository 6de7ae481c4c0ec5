#include "csp/prune_in_place.h"

#include <tuple>

#include "compact_in_place.h"
#include "prune.h"

namespace csp {
namespace {

std::tuple<Tensor, Tensor> prune_(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const Tensor& modality, int64_t budget, std::optional<int64_t> recent,
                                  const std::optional<Tensor>& query_modality, double n,
                                  std::optional<double> scale, std::string heads, bool causal,
                                  const std::optional<Tensor>& lse, double cross_ratio, std::string combine,
                                  std::optional<int64_t> k_self, std::optional<int64_t> k_cross,
                                  std::string pool, int64_t pool_kernel) {
  constexpr const char* op = "prune_";
  PruneInputs inputs =
      fill_prune_params(op, query, key, value, modality, query_modality, n, scale, heads, lse,
                        {budget, recent, cross_ratio, combine, k_self, k_cross, pool, pool_kernel, causal});
  CSP_CHECK(budget <= key.size(2), op, "budget must be at most key's L = ", key.size(2), " in place, got ",
            budget);
  check_own_memory(op, key, value);

  inputs.allocate(op, key);
  const Tensor& indices = inputs.indices;
  inputs.params.compact = fill_compact_params(key, value, indices, key, value);
  // The scratch is there before the first row moves: a call that has no room for it changes nothing.
  launch(op, {{"query", query}, {"key", key}, {"indices", indices}}, inputs.params,
         CSP_LAUNCHER(prune_in_place), CSP_WORKSPACE(prune));
  return {indices, inputs.lengths};
}

}  // namespace
}  // namespace csp

CSP_IMPL(prune_)
