#include "compact.h"

#include <tuple>

namespace csp {
namespace {

std::tuple<Tensor, Tensor> compact(const Tensor& key, const Tensor& value, const Tensor& indices) {
  constexpr const char* op = "compact";
  check_compact(op, key, value);
  check_indices(op, indices, key);

  const Tensor rows = contiguous(op, "indices", indices);
  Tensor key_out = empty_compacted(op, key, rows.size(2));
  Tensor value_out = empty_compacted(op, value, rows.size(2));
  const CompactParams params = fill_compact_params(key, value, rows, key_out, value_out);
  if (checks_values()) check_rows(op, params, rows);
  launch(op, {{"key", key}, {"value", value}, {"indices", rows}}, params, CSP_LAUNCHER(compact));
  return {key_out, value_out};
}

}  // namespace
}  // namespace csp

CSP_IMPL(compact)
