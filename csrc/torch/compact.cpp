#include "compact.h"

#include <tuple>

namespace csp {
namespace {

void check_indices(const char* op, const Tensor& indices, const Tensor& key) {
  check_rank(op, "indices", indices, 3, "[B, Hs, T]");
  check_dtype(op, "indices", indices, ScalarType::Int);
  check_device(op, "indices", indices, key, "key");
  check_size(op, "indices", indices, 0, key.size(0), "key's batch size");
  CSP_CHECK(indices.size(1) == key.size(1) || indices.size(1) == 1, op, "indices must have key's ",
            key.size(1), " heads or 1, got shape ", shape_of(indices));
  check_int32(op, "indices' length T", indices.size(2));
}

void check_values(const char* op, CompactParams params, const Tensor& indices) {
  const Tensor host = on_host(op, "indices", indices);
  params.indices = static_cast<const int32_t*>(host.const_data_ptr());
  const int64_t bad = compact_cpu_bad_index(params);
  if (bad < 0) return;
  const int64_t row = bad / params.budget;
  fail(op, "indices must lie in [-1, L = ", params.keys, "), got ", params.indices[bad], " at [",
       row / params.score_heads, ", ", row % params.score_heads, ", ", bad % params.budget, "]");
}

std::tuple<Tensor, Tensor> compact(const Tensor& key, const Tensor& value, const Tensor& indices) {
  constexpr const char* op = "compact";
  check_compact(op, key, value);
  check_indices(op, indices, key);

  const Tensor rows = contiguous(op, "indices", indices);
  Tensor key_out = empty_compacted(op, key, rows.size(2));
  Tensor value_out = empty_compacted(op, value, rows.size(2));
  const CompactParams params = fill_compact_params(key, value, rows, key_out, value_out);
  if (checks_values()) check_values(op, params, rows);
  launch(op, {{"key", key}, {"value", value}, {"indices", rows}}, params, CSP_LAUNCHER(compact));
  return {key_out, value_out};
}

}  // namespace
}  // namespace csp

CSP_IMPL(compact)
