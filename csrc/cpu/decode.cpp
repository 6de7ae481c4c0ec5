#include "csp/decode.h"

#include "decode_kernel.h"
#include "tasks.h"

namespace csp {
namespace {

constexpr int64_t kVector = 16;     // the widest vector, in floats
constexpr int64_t kMinSplit = 256;  // below, merging and the pipeline's warm-up show
constexpr int64_t kTasks = 512;     // enough to keep any one machine's cores evenly busy

constexpr int64_t round_up(int64_t x, int64_t step) {
  return (x + step - 1) / step * step;
}

DecodePlan plan_of(const DecodeParams& p) {
  DecodePlan plan;
  const int64_t heads = p.batch * p.num_kv_heads;
  plan.rows = p.num_heads / p.num_kv_heads * p.queries;
  plan.width = round_up(p.head_dim, kVector);
  const int64_t even = round_up((p.capacity * heads + kTasks - 1) / kTasks, kDecodeTile);
  plan.split = even > kMinSplit ? even : kMinSplit;
  plan.splits = p.capacity > 0 ? (p.capacity + plan.split - 1) / plan.split : 1;
  plan.partial = plan.rows * (plan.width + 2);
  if (p.dtype == DType::kFloat64) {
    plan.scratch = plan.split;  // the logits of one row
  } else {
    // The scaled queries, running max and sum of each lane, logits of a tile, and a packed tile of narrow
    // heads.
    const int64_t packed = p.head_dim < kVector ? 2 * kDecodeTile * kVector : 0;
    plan.scratch = plan.rows * (plan.width + 2 * kVector) + 8 * kDecodeTile + packed;
  }
  return plan;
}

DecodeRange range_of(const DecodeParams& p, int64_t b, int64_t h) {
  const int64_t start = p.start != nullptr ? p.start[b * p.start_batch + h * p.start_head] : 0;
  const int64_t end = p.end != nullptr ? *p.end : p.capacity;
  return {start < 0 ? 0 : start, end < p.capacity ? end : p.capacity};
}

bool is_empty(const DecodeParams& p) {
  return p.batch == 0 || p.num_heads == 0 || p.num_kv_heads == 0 || p.queries == 0 || p.head_dim == 0;
}

size_t partials_bytes(const DecodeParams& p, const DecodePlan& plan) {
  const int64_t tasks = p.batch * p.num_kv_heads * plan.splits;
  return cache_lines(static_cast<size_t>(tasks * plan.partial * dtype_bytes(accumulate_dtype(p.dtype))));
}

size_t scratch_bytes(const DecodeParams& p, const DecodePlan& plan) {
  return cache_lines(static_cast<size_t>(plan.scratch * dtype_bytes(accumulate_dtype(p.dtype))));
}

}  // namespace

size_t decode_cpu_workspace_bytes(const DecodeParams& params, int32_t num_threads) {
  if (is_empty(params)) return 0;
  const DecodePlan plan = plan_of(params);
  const size_t workers = num_threads < 1 ? 1 : static_cast<size_t>(num_threads);
  return partials_bytes(params, plan) + workers * scratch_bytes(params, plan);
}

void decode_cpu(const DecodeParams& params, void* workspace, const Parallel& parallel) {
  if (is_empty(params)) return;
  const DecodePlan plan = plan_of(params);
  const int64_t heads = params.batch * params.num_kv_heads;
  const int64_t partial_bytes = plan.partial * dtype_bytes(accumulate_dtype(params.dtype));
  char* const partials = static_cast<char*>(workspace);
  char* const scratch = partials + partials_bytes(params, plan);
  const int64_t scratch_step = static_cast<int64_t>(scratch_bytes(params, plan));

  for_each_task(parallel, heads * plan.splits, [&](int64_t task, int32_t worker) {
    const int64_t head = task / plan.splits;
    const DecodeRange range = range_of(params, head / params.num_kv_heads, head % params.num_kv_heads);
    CSP_CALL_KERNEL(decode_split, params, plan, task, range, partials + task * partial_bytes,
                    scratch + worker * scratch_step);
    if (plan.splits == 1) CSP_CALL_KERNEL(decode_merge, params, plan, head, partials + task * partial_bytes);
  });
  if (plan.splits == 1) return;
  for_each_task(parallel, heads, [&](int64_t head, int32_t) {
    CSP_CALL_KERNEL(decode_merge, params, plan, head, partials + head * plan.splits * partial_bytes);
  });
}

}  // namespace csp
