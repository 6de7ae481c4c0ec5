#include "csp/decode.h"

#include <atomic>
#include <new>

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
  const int64_t whole = round_up(p.capacity, kDecodeTile);
  plan.split = even > kMinSplit ? even : kMinSplit;
  if (plan.split > whole) plan.split = whole;  // many heads: one split each, and no scratch beyond it
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

// The pieces of the workspace: partial results of all tasks, tasks done per head, scratch of each worker.
struct Layout {
  size_t partial = 0;  // bytes of one task's result
  size_t done = 0;     // offset
  size_t scratch = 0;  // offset
  size_t worker = 0;   // bytes of one worker's scratch
};

Layout layout_of(const DecodeParams& p, const DecodePlan& plan) {
  const auto element = static_cast<size_t>(dtype_bytes(accumulate_dtype(p.dtype)));
  const auto heads = static_cast<size_t>(p.batch * p.num_kv_heads);
  Layout layout;
  layout.partial = static_cast<size_t>(plan.partial) * element;
  layout.done = cache_lines(heads * static_cast<size_t>(plan.splits) * layout.partial);
  layout.scratch = layout.done + cache_lines(heads * sizeof(std::atomic<int32_t>));
  layout.worker = cache_lines(static_cast<size_t>(plan.scratch) * element);
  return layout;
}

}  // namespace

int64_t decode_cpu_tasks(const DecodeParams& params) {
  return is_empty(params) ? 0 : params.batch * params.num_kv_heads * plan_of(params).splits;
}

size_t decode_cpu_workspace_bytes(const DecodeParams& params, int32_t num_threads) {
  if (is_empty(params)) return 0;
  const Layout layout = layout_of(params, plan_of(params));
  const int64_t tasks = decode_cpu_tasks(params);
  const int64_t threads = num_threads < 1 ? 1 : num_threads;
  return layout.scratch + layout.worker * static_cast<size_t>(tasks < threads ? tasks : threads);
}

void decode_cpu(const DecodeParams& params, void* workspace, const Parallel& parallel) {
  if (is_empty(params)) return;
  const DecodePlan plan = plan_of(params);
  const Layout layout = layout_of(params, plan);
  const int64_t heads = params.batch * params.num_kv_heads;
  char* const base = static_cast<char*>(workspace);
  auto* const done = reinterpret_cast<std::atomic<int32_t>*>(base + layout.done);
  for (int64_t head = 0; head < heads; ++head) new (done + head) std::atomic<int32_t>(0);

  for_each_task(parallel, decode_cpu_tasks(params), [&](int64_t task, int32_t worker) {
    const int64_t head = task / plan.splits;
    const DecodeRange range = range_of(params, head / params.num_kv_heads, head % params.num_kv_heads);
    CSP_CALL_KERNEL(decode_split, params, plan, task, range,
                    base + static_cast<size_t>(task) * layout.partial,
                    base + layout.scratch + static_cast<size_t>(worker) * layout.worker);
    // Whoever finishes a head's last split merges them all, in their order: one trip through the pool.
    if (done[head].fetch_add(1, std::memory_order_acq_rel) + 1 < plan.splits) return;
    CSP_CALL_KERNEL(decode_merge, params, plan, head,
                    base + static_cast<size_t>(head * plan.splits) * layout.partial);
  });
}

}  // namespace csp
