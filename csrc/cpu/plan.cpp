#include "csp/plan.h"

#include <initializer_list>

namespace csp {

Plan plan_score_cpu(const ScoreParams& p, int32_t num_threads) {
  const int64_t element = dtype_bytes(p.dtype), real = dtype_bytes(accumulate_dtype(p.dtype));
  const int64_t queries = p.batch * p.num_heads * p.window;
  const int64_t score_heads = p.heads == Heads::kShared ? 1 : p.num_kv_heads;
  Plan plan;
  plan.workspace_bytes = static_cast<int64_t>(score_cpu_workspace_bytes(p, num_threads));
  plan.bytes_read = (queries + p.batch * p.num_kv_heads * p.keys) * p.head_dim * element +
                    p.batch * (p.keys + p.window) + (p.lse != nullptr ? queries * real : 0);
  plan.bytes_written = 2 * p.batch * score_heads * p.keys * real;
  plan.flops = 2 * queries * p.keys * p.head_dim;
  plan.tasks = score_cpu_tasks(p);
  return plan;
}

Plan plan_select_cpu(const SelectParams& p, int32_t num_threads) {
  const int64_t rows = p.batch * p.score_heads;
  Plan plan;
  plan.workspace_bytes = static_cast<int64_t>(select_cpu_workspace_bytes(p, num_threads));
  plan.bytes_read = 2 * rows * p.keys * dtype_bytes(p.dtype) + p.batch * (p.keys + p.window);
  plan.bytes_written = rows * (p.budget + 1) * static_cast<int64_t>(sizeof(int32_t));
  plan.tasks = select_cpu_tasks(p);
  return plan;
}

Plan plan_compact_cpu(const CompactParams& p) {
  const int64_t rows = p.batch * p.num_kv_heads * p.budget;
  Plan plan;
  plan.bytes_written = rows * (p.head_dim + p.value_dim) * p.element_bytes;
  plan.bytes_read =
      plan.bytes_written + p.batch * p.score_heads * p.budget * static_cast<int64_t>(sizeof(int32_t));
  plan.tasks = compact_cpu_tasks(p);
  return plan;
}

Plan plan_decode_cpu(const DecodeParams& p, int32_t num_threads) {
  const int64_t element = dtype_bytes(p.dtype), real = dtype_bytes(accumulate_dtype(p.dtype));
  const int64_t queries = p.batch * p.num_heads * p.queries;
  Plan plan;
  plan.workspace_bytes = static_cast<int64_t>(decode_cpu_workspace_bytes(p, num_threads));
  plan.bytes_read = (queries + 2 * p.batch * p.num_kv_heads * p.capacity) * p.head_dim * element;
  plan.bytes_written = queries * (p.head_dim * element + real);
  plan.flops = 4 * queries * p.capacity * p.head_dim;
  plan.tasks = decode_cpu_tasks(p);
  return plan;
}

Plan plan_prune_cpu(const PruneParams& p, int32_t num_threads) {
  Plan plan;
  for (const Plan& part : {plan_score_cpu(p.score, num_threads), plan_select_cpu(p.select, num_threads),
                           plan_compact_cpu(p.compact)}) {
    plan.bytes_read += part.bytes_read;
    plan.bytes_written += part.bytes_written;
    plan.flops += part.flops;
    plan.tasks += part.tasks;
  }
  plan.workspace_bytes = static_cast<int64_t>(prune_cpu_workspace_bytes(p, num_threads));
  return plan;
}

}  // namespace csp
