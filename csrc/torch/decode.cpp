#include "csp/decode.h"

#include "backend.h"
#include "checks.h"

namespace csp {
namespace {

constexpr const char* op = "decode";
constexpr int64_t kMaxQueries = 8;
constexpr int64_t kMaxHeadDim = 512;

void check_cache(const char* name, const Tensor& t, const Tensor& query, const Tensor& key) {
  check_rank(op, name, t, 4, "[B, Hkv, C, D]");
  check_dtype(op, name, t, query.scalar_type());
  check_device(op, name, t, query, "query");
  check_size(op, name, t, 0, query.size(0), "batch size");
  check_size(op, name, t, 1, key.size(1), "key's head count");
  check_size(op, name, t, 2, key.size(2), "key's capacity");
  check_size(op, name, t, 3, query.size(3), "query's head_dim");
  check_unit_stride(op, name, t);
}

void set_start(DecodeParams& params, const Tensor& start, const Tensor& query) {
  CSP_CHECK(start.dim() == 1 || start.dim() == 2, op, "start must be [B] or [B, Hkv], got ", start.dim(),
            "-D ", shape_of(start));
  check_dtype(op, "start", start, ScalarType::Int);
  check_device(op, "start", start, query, "query");
  check_size(op, "start", start, 0, params.batch, "batch size");
  if (start.dim() == 2) check_size(op, "start", start, 1, params.num_kv_heads, "key's head count");
  params.start = start.const_data_ptr<int32_t>();
  params.start_batch = start.stride(0);
  params.start_head = start.dim() == 2 ? start.stride(1) : 0;
}

void set_end(DecodeParams& params, const Tensor& end, const Tensor& query) {
  CSP_CHECK(end.dim() == 0, op, "end must be a 0-D int32 tensor, got ", end.dim(), "-D ", shape_of(end));
  check_dtype(op, "end", end, ScalarType::Int);
  check_device(op, "end", end, query, "query");
  params.end = end.const_data_ptr<int32_t>();
}

DecodeParams params_of(const Tensor& query, const Tensor& key, const Tensor& value,
                       const std::optional<Tensor>& start, const std::optional<Tensor>& end, double n,
                       std::optional<double> scale) {
  check_rank(op, "query", query, 4, "[B, Hq, Q, D]");
  DecodeParams params;
  params.dtype = floating_dtype(op, "query", query);
  CSP_CHECK(query.size(2) >= 1 && query.size(2) <= kMaxQueries, op, "query must hold 1 to ", kMaxQueries,
            " new queries per row, got Q = ", query.size(2));
  CSP_CHECK(query.size(3) >= 1 && query.size(3) <= kMaxHeadDim, op,
            "query must have a head_dim between 1 and ", kMaxHeadDim, ", got ", query.size(3));
  check_unit_stride(op, "query", query);
  check_cache("key", key, query, key);
  check_cache("value", value, query, key);
  check_group(op, query.size(1), key.size(1));
  check_int32(op, "key's capacity", key.size(2));
  check_n(op, n);

  params.query = query.const_data_ptr();
  params.query_stride = strides_of(query);
  params.key = key.const_data_ptr();
  params.key_stride = strides_of(key);
  params.value = value.const_data_ptr();
  params.value_stride = strides_of(value);
  params.batch = query.size(0);
  params.num_heads = query.size(1);
  params.num_kv_heads = key.size(1);
  params.queries = query.size(2);
  params.capacity = key.size(2);
  params.head_dim = query.size(3);
  params.n = n;
  params.scale = check_scale(op, scale, params.head_dim);
  if (start) set_start(params, *start, query);
  if (end) set_end(params, *end, query);
  return params;
}

void check_start(const Tensor& start, const DecodeParams& params) {
  const Tensor host = on_host(op, "start", start);
  const int32_t* const values = host.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t h = 0; h < params.num_kv_heads; ++h) {
      const int32_t first = values[b * host.stride(0) + (host.dim() == 2 ? h * host.stride(1) : 0)];
      CSP_CHECK(first >= 0 && first <= params.capacity, op, "start must be between 0 and the capacity ",
                params.capacity, ", got ", first, " for row ", b, ", head ", h);
    }
  }
}

void check_end(const Tensor& end, const DecodeParams& params) {
  const Tensor host = on_host(op, "end", end);
  const int32_t last = *host.const_data_ptr<int32_t>();
  CSP_CHECK(last >= 0 && last <= params.capacity, op, "end must be between 0 and the capacity ",
            params.capacity, ", got ", last);
}

std::tuple<Tensor, Tensor> decode(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const std::optional<Tensor>& start, const std::optional<Tensor>& end,
                                  double n, std::optional<double> scale) {
  DecodeParams params = params_of(query, key, value, start, end, n, scale);
  if (end && checks_values()) check_end(*end, params);
  if (start && checks_values()) check_start(*start, params);
  Tensor out = empty(op, query, {params.batch, params.num_heads, params.queries, params.head_dim},
                     query.scalar_type());
  Tensor lse = empty(op, query, {params.batch, params.num_heads, params.queries},
                     scalar_type_of(accumulate_dtype(params.dtype)));
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  launch(op, {{"query", query}, {"key", key}}, params, CSP_LAUNCHER(decode), CSP_WORKSPACE(decode));
  return {out, lse};
}

}  // namespace
}  // namespace csp

CSP_IMPL(decode)
