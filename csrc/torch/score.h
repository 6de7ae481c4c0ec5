#pragma once

#include <optional>
#include <string>

#include "backend.h"
#include "checks.h"
#include "csp/score.h"

// Shared by score, prune and prune_: one function checks the arguments and fills the params.

namespace csp {

// The params, and the tensors that must outlive them. The outputs are left to the caller.
struct ScoreInputs {
  ScoreParams params;
  Tensor modality;
  Tensor query_modality;
  Tensor lse;

  int64_t score_heads() const { return params.heads == Heads::kShared ? 1 : params.num_kv_heads; }
};

// Sizes that only a stride of 0 can reach would overflow the byte counts of the workspace.
inline void check_volume(const char* op, const Tensor& query, const Tensor& key) {
  double products = 1;
  for (const int64_t size : {query.size(0), query.size(1), query.size(2), query.size(3), key.size(2)}) {
    products *= size > 1 ? static_cast<double>(size) : 1;
  }
  CSP_CHECK(products <= 0x1p56, op, "query ", shape_of(query), " and key ", shape_of(key),
            " must give at most 2^56 products, got ", products);
}

inline void check_query_and_key(const char* op, const Tensor& query, const Tensor& key) {
  check_rank(op, "query", query, 4, "[B, Hq, O, D]");
  check_rank(op, "key", key, 4, "[B, Hkv, L, D]");
  floating_dtype(op, "query", query);
  check_dtype(op, "key", key, query.scalar_type());
  check_device(op, "key", key, query, "query");
  check_size(op, "key", key, 0, query.size(0), "query's batch size");
  check_size(op, "key", key, 3, query.size(3), "query's head_dim");
  check_group(op, query.size(1), key.size(1));
  check_int32(op, "key's length L", key.size(2));
  CSP_CHECK(query.size(2) <= key.size(2), op, "query must hold at most L = ", key.size(2),
            " positions, got O = ", query.size(2));
  check_unit_stride(op, "query", query);
  check_unit_stride(op, "key", key);
  check_volume(op, query, key);
}

inline ScoreInputs fill_score_params(const char* op, const Tensor& query, const Tensor& key,
                                     const Tensor& modality, const std::optional<Tensor>& query_modality,
                                     double n, std::optional<double> scale, const std::string& heads,
                                     bool causal, const std::optional<Tensor>& lse) {
  check_query_and_key(op, query, key);
  check_n(op, n);
  ScoreInputs inputs;
  ScoreParams& params = inputs.params;
  params.dtype = floating_dtype(op, "query", query);
  params.batch = query.size(0);
  params.num_heads = query.size(1);
  params.num_kv_heads = key.size(1);
  params.window = query.size(2);
  params.keys = key.size(2);
  params.head_dim = query.size(3);
  params.n = n;
  params.scale = check_scale(op, scale, params.head_dim);
  params.heads = check_heads(op, heads);
  params.causal = causal;
  params.query = query.const_data_ptr();
  params.query_stride = strides_of(query);
  params.key = key.const_data_ptr();
  params.key_stride = strides_of(key);

  inputs.modality =
      check_modality(op, "modality", modality, query, "query", params.batch, params.keys, "[B, L]");
  inputs.query_modality =
      query_modality.has_value()
          ? check_modality(op, "query_modality", *query_modality, query, "query", params.batch, params.window,
                           "[B, O]")
          : contiguous(op, "modality",
                       torch::stable::narrow(inputs.modality, 1, params.keys - params.window, params.window));
  params.modality = static_cast<const int8_t*>(inputs.modality.const_data_ptr());
  params.query_modality = static_cast<const int8_t*>(inputs.query_modality.const_data_ptr());
  if (lse.has_value()) {
    check_rank(op, "lse", *lse, 3, "[B, Hq, O]");
    check_dtype(op, "lse", *lse, scalar_type_of(accumulate_dtype(params.dtype)));
    check_device(op, "lse", *lse, query, "query");
    check_size(op, "lse", *lse, 0, params.batch, "query's batch size");
    check_size(op, "lse", *lse, 1, params.num_heads, "query's heads");
    check_size(op, "lse", *lse, 2, params.window, "query's length O");
    inputs.lse = contiguous(op, "lse", *lse);
    params.lse = inputs.lse.const_data_ptr();
  }
  return inputs;
}

}  // namespace csp
