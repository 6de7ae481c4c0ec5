#include "csp/score.h"

#include <tuple>

#include "backend.h"
#include "checks.h"

namespace csp {
namespace {

std::tuple<Tensor, Tensor> score(const Tensor& query, const Tensor& key, const Tensor& modality,
                                 const std::optional<Tensor>& query_modality, double n,
                                 std::optional<double> scale, std::string heads, bool causal,
                                 const std::optional<Tensor>& lse) {
  constexpr const char* op = "score";
  check_rank(op, "query", query, 4, "[B, Hq, O, D]");
  check_rank(op, "key", key, 4, "[B, Hkv, L, D]");
  ScoreParams params;
  params.dtype = floating_dtype(op, "query", query);
  params.batch = query.size(0);
  params.num_heads = query.size(1);
  params.num_kv_heads = key.size(1);
  params.window = query.size(2);
  params.keys = key.size(2);
  params.head_dim = query.size(3);
  check_dtype(op, "key", key, query.scalar_type());
  check_device(op, "key", key, query, "query");
  check_size(op, "key", key, 0, params.batch, "query's batch size");
  check_size(op, "key", key, 3, params.head_dim, "query's head_dim");
  check_group(op, params.num_heads, params.num_kv_heads);
  check_int32(op, "key's length L", params.keys);
  CSP_CHECK(params.window <= params.keys, op, "query must hold at most L = ", params.keys,
            " positions, got O = ", params.window);
  check_unit_stride(op, "query", query);
  check_unit_stride(op, "key", key);

  Tensor key_modality =
      check_modality(op, "modality", modality, query, "query", params.batch, params.keys, "[B, L]");
  const Tensor window_modality = query_modality.has_value()
                                     ? check_modality(op, "query_modality", *query_modality, query, "query",
                                                      params.batch, params.window, "[B, O]")
                                     : torch::stable::contiguous(torch::stable::narrow(
                                           key_modality, 1, params.keys - params.window, params.window));
  check_n(op, n);
  params.scale = check_scale(op, scale, params.head_dim);
  params.heads = check_heads(op, heads);

  const ScalarType out_type = scalar_type_of(accumulate_dtype(params.dtype));
  Tensor row_lse;
  if (lse.has_value()) {
    check_rank(op, "lse", *lse, 3, "[B, Hq, O]");
    check_dtype(op, "lse", *lse, out_type);
    check_device(op, "lse", *lse, query, "query");
    check_size(op, "lse", *lse, 0, params.batch, "query's batch size");
    check_size(op, "lse", *lse, 1, params.num_heads, "query's heads");
    check_size(op, "lse", *lse, 2, params.window, "query's length O");
    row_lse = torch::stable::contiguous(*lse);
    params.lse = row_lse.const_data_ptr();
  }
  const int64_t out_heads = params.heads == Heads::kShared ? 1 : params.num_kv_heads;
  Tensor self = empty(query, {params.batch, out_heads, params.keys}, out_type);
  Tensor cross = empty(query, {params.batch, out_heads, params.keys}, out_type);

  params.query = query.const_data_ptr();
  params.query_stride = strides_of(query);
  params.key = key.const_data_ptr();
  params.key_stride = strides_of(key);
  params.modality = static_cast<const int8_t*>(key_modality.const_data_ptr());
  params.query_modality = static_cast<const int8_t*>(window_modality.const_data_ptr());
  params.self = self.mutable_data_ptr();
  params.cross = cross.mutable_data_ptr();
  params.n = n;
  params.causal = causal;

  const Parallel parallel = torch_parallel();
  Tensor scratch = workspace(query, score_cpu_workspace_bytes(params, parallel.num_threads));
  score_cpu(params, scratch.mutable_data_ptr(), parallel);
  return {self, cross};
}

}  // namespace
}  // namespace csp

CSP_IMPL(score)
