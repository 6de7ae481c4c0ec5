#include "score.h"

#include <tuple>

namespace csp {
namespace {

std::tuple<Tensor, Tensor> score(const Tensor& query, const Tensor& key, const Tensor& modality,
                                 const std::optional<Tensor>& query_modality, double n,
                                 std::optional<double> scale, std::string heads, bool causal,
                                 const std::optional<Tensor>& lse) {
  constexpr const char* op = "score";
  ScoreInputs inputs =
      fill_score_params(op, query, key, modality, query_modality, n, scale, heads, causal, lse);
  ScoreParams& params = inputs.params;
  const ScalarType type = scalar_type_of(accumulate_dtype(params.dtype));
  Tensor self = empty(op, query, {params.batch, inputs.score_heads(), params.keys}, type);
  Tensor cross = empty(op, query, {params.batch, inputs.score_heads(), params.keys}, type);
  params.self = self.mutable_data_ptr();
  params.cross = cross.mutable_data_ptr();
  launch(op, {{"query", query}, {"key", key}}, params, CSP_LAUNCHER(score), CSP_WORKSPACE(score));
  return {self, cross};
}

}  // namespace
}  // namespace csp

CSP_IMPL(score)
