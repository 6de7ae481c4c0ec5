#include "csp/compact_in_place.h"

#include "compact_in_place.h"

namespace csp {
namespace {

void check_order(const char* op, CompactParams params, const Tensor& indices) {
  const Tensor host = on_host(op, "indices", indices);
  params.indices = static_cast<const int32_t*>(host.const_data_ptr());
  const int64_t bad = compact_in_place_cpu_bad_order(params);
  if (bad < 0) return;
  const int64_t row = bad / params.budget;
  fail(op, "indices must ascend along T, -1 aside, got ", params.indices[bad], " too late at [",
       row / params.score_heads, ", ", row % params.score_heads, ", ", bad % params.budget, "]");
}

void compact_(const Tensor& key, const Tensor& value, const Tensor& indices) {
  constexpr const char* op = "compact_";
  check_compact(op, key, value);
  check_indices(op, indices, key);
  CSP_CHECK(indices.size(2) <= key.size(2), op, "indices must name at most key's L = ", key.size(2),
            " rows, got T = ", indices.size(2));
  check_own_memory(op, key, value);

  const Tensor rows = contiguous(op, "indices", indices);
  const CompactParams params = fill_compact_params(key, value, rows, key, value);
  if (checks_values()) {
    check_rows(op, params, rows);
    check_order(op, params, rows);
  }
  launch(op, {{"key", key}, {"value", value}, {"indices", rows}}, params, CSP_LAUNCHER(compact_in_place));
}

}  // namespace
}  // namespace csp

CSP_IMPL(compact_)
