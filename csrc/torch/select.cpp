#include "csp/select.h"

#include <tuple>

#include "backend.h"
#include "checks.h"
#include "select_options.h"

namespace csp {
namespace {

std::tuple<Tensor, Tensor> select(const Tensor& self, const Tensor& cross, const Tensor& modality,
                                  const Tensor& query_modality, int64_t budget, std::optional<int64_t> recent,
                                  double cross_ratio, std::string combine, std::optional<int64_t> k_self,
                                  std::optional<int64_t> k_cross, std::string pool, int64_t pool_kernel,
                                  bool causal) {
  constexpr const char* op = "select";
  SelectParams params;
  check_rank(op, "self", self, 3, "[B, Hs, L]");
  params.dtype = floating_dtype(op, "self", self);
  params.batch = self.size(0);
  params.score_heads = self.size(1);
  params.keys = self.size(2);
  check_int32(op, "L, the last size of self,", params.keys);
  check_rank(op, "cross", cross, 3, "[B, Hs, L]");
  check_dtype(op, "cross", cross, self.scalar_type());
  check_device(op, "cross", cross, self, "self");
  check_size(op, "cross", cross, 0, params.batch, "batch size");
  check_size(op, "cross", cross, 1, params.score_heads, "score heads");
  check_size(op, "cross", cross, 2, params.keys, "L");
  check_rank(op, "query_modality", query_modality, 2, "[B, O]");
  params.window = query_modality.size(1);
  CSP_CHECK(params.window <= params.keys, op, "query_modality must have at most L = ", params.keys,
            " queries, got shape ", shape_of(query_modality));
  fill_options(op, {budget, recent, cross_ratio, combine, k_self, k_cross, pool, pool_kernel, causal},
               params.window, params);

  const Tensor keys_of =
      check_modality(op, "modality", modality, self, "self", params.batch, params.keys, "[B, L]");
  const Tensor queries_of = check_modality(op, "query_modality", query_modality, self, "self", params.batch,
                                           params.window, "[B, O]");
  const Tensor own = contiguous(op, "self", self), other = contiguous(op, "cross", cross);
  Tensor indices = empty(op, self, {params.batch, params.score_heads, budget}, ScalarType::Int);
  Tensor lengths = empty(op, self, {params.batch, params.score_heads}, ScalarType::Int);
  params.self = own.const_data_ptr();
  params.cross = other.const_data_ptr();
  params.modality = static_cast<const int8_t*>(keys_of.const_data_ptr());
  params.query_modality = static_cast<const int8_t*>(queries_of.const_data_ptr());
  params.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  params.lengths = static_cast<int32_t*>(lengths.mutable_data_ptr());
  launch(op, {{"self", self}, {"indices", indices}}, params, CSP_LAUNCHER(select), CSP_WORKSPACE(select));
  return {indices, lengths};
}

}  // namespace
}  // namespace csp

CSP_IMPL(select)
