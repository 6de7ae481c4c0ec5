#include "csp/plan.h"

#include <initializer_list>

namespace csp {
namespace {

// `compact` is the plan of the part that the two ways to compact differ in.
Plan plan_of(const PruneParams& p, const Plan& compact, int32_t num_threads) {
  Plan plan;
  for (const Plan& part :
       {plan_score_cpu(p.score, num_threads), plan_select_cpu(p.select, num_threads), compact}) {
    plan.bytes_read += part.bytes_read;
    plan.bytes_written += part.bytes_written;
    plan.flops += part.flops;
    plan.tasks += part.tasks;
  }
  plan.workspace_bytes = static_cast<int64_t>(prune_cpu_workspace_bytes(p, num_threads));
  return plan;
}

}  // namespace

Plan plan_score_cpu(const ScoreParams& p, int32_t num_threads) {
  Plan plan = cost_of(p);
  plan.workspace_bytes = static_cast<int64_t>(score_cpu_workspace_bytes(p, num_threads));
  plan.tasks = score_cpu_tasks(p);
  return plan;
}

Plan plan_select_cpu(const SelectParams& p, int32_t num_threads) {
  Plan plan = cost_of(p);
  plan.workspace_bytes = static_cast<int64_t>(select_cpu_workspace_bytes(p, num_threads));
  plan.tasks = select_cpu_tasks(p);
  return plan;
}

Plan plan_compact_cpu(const CompactParams& p) {
  Plan plan = cost_of(p);
  plan.tasks = compact_cpu_tasks(p);
  return plan;
}

Plan plan_compact_in_place_cpu(const CompactParams& p) {
  Plan plan = cost_of(p);
  plan.tasks = compact_in_place_cpu_tasks(p);
  return plan;
}

Plan plan_decode_cpu(const DecodeParams& p, int32_t num_threads) {
  Plan plan = cost_of(p);
  plan.workspace_bytes = static_cast<int64_t>(decode_cpu_workspace_bytes(p, num_threads));
  plan.tasks = decode_cpu_tasks(p);
  return plan;
}

Plan plan_prune_cpu(const PruneParams& p, int32_t num_threads) {
  return plan_of(p, plan_compact_cpu(p.compact), num_threads);
}

Plan plan_prune_in_place_cpu(const PruneParams& p, int32_t num_threads) {
  return plan_of(p, plan_compact_in_place_cpu(p.compact), num_threads);
}

}  // namespace csp
