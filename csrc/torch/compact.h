#pragma once

#include "backend.h"
#include "checks.h"
#include "csp/compact.h"

// Shared by compact, compact_, prune and prune_: the checks of the arguments, and one function that fills the
// params.

namespace csp {

inline void check_compact(const char* op, const Tensor& key, const Tensor& value) {
  check_rank(op, "key", key, 4, "[B, Hkv, L, D]");
  check_rank(op, "value", value, 4, "[B, Hkv, L, Dv]");
  check_device(op, "value", value, key, "key");
  check_dtype(op, "value", value, type_of(op, "key", key));
  check_size(op, "value", value, 0, key.size(0), "key's batch size");
  check_size(op, "value", value, 1, key.size(1), "key's heads");
  check_size(op, "value", value, 2, key.size(2), "key's length");
  check_int32(op, "key's length", key.size(2));
  check_unit_stride(op, "key", key);
  check_unit_stride(op, "value", value);
}

inline void check_indices(const char* op, const Tensor& indices, const Tensor& key) {
  check_rank(op, "indices", indices, 3, "[B, Hs, T]");
  check_dtype(op, "indices", indices, ScalarType::Int);
  check_device(op, "indices", indices, key, "key");
  check_size(op, "indices", indices, 0, key.size(0), "key's batch size");
  CSP_CHECK(indices.size(1) == key.size(1) || indices.size(1) == 1, op, "indices must have key's ",
            key.size(1), " heads or 1, got shape ", shape_of(indices));
  check_int32(op, "indices' length T", indices.size(2));
}

inline void check_rows(const char* op, CompactParams params, const Tensor& indices) {
  const Tensor host = on_host(op, "indices", indices);
  params.indices = static_cast<const int32_t*>(host.const_data_ptr());
  const int64_t bad = compact_cpu_bad_index(params);
  if (bad < 0) return;
  const int64_t row = bad / params.budget;
  fail(op, "indices must lie in [-1, L = ", params.keys, "), got ", params.indices[bad], " at [",
       row / params.score_heads, ", ", row % params.score_heads, ", ", bad % params.budget, "]");
}

// `indices` [B, Hs, T] is contiguous.
inline CompactParams fill_compact_params(const Tensor& key, const Tensor& value, const Tensor& indices,
                                         const Tensor& key_out, const Tensor& value_out) {
  CompactParams params;
  params.element_bytes = static_cast<int64_t>(key.element_size());
  params.key = key.const_data_ptr();
  params.value = value.const_data_ptr();
  params.key_stride = strides_of(key);
  params.value_stride = strides_of(value);
  params.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  params.key_out = key_out.mutable_data_ptr();
  params.value_out = value_out.mutable_data_ptr();
  params.batch = key.size(0);
  params.num_kv_heads = key.size(1);
  params.score_heads = indices.size(1);
  params.keys = key.size(2);
  params.budget = indices.size(2);
  params.head_dim = key.size(3);
  params.value_dim = value.size(3);
  return params;
}

inline Tensor empty_compacted(const char* op, const Tensor& cache, int64_t budget) {
  return empty(op, cache, {cache.size(0), cache.size(1), budget, cache.size(3)}, cache.scalar_type());
}

}  // namespace csp
