#include "prune_plan.h"

#include <algorithm>
#include <initializer_list>

#include "csp/plan.h"
#include "launch.h"

namespace csp {
namespace {

// `compact` is the plan of the part that the two ways to compact differ in.
Plan plan_of(const PruneParams& p, const Plan& compact, const CudaDevice& device) {
  Plan plan;
  for (const Plan& part : {plan_score_cuda(p.score, device), plan_select_cuda(p.select, device), compact}) {
    plan.bytes_read += part.bytes_read;
    plan.bytes_written += part.bytes_written;
    plan.flops += part.flops;
    plan.launches += part.launches;
  }
  plan.workspace_bytes = static_cast<int64_t>(prune_cuda_workspace_bytes(p, device));
  return plan;
}

}  // namespace

PruneLayout prune_layout(const PruneParams& p, const CudaDevice& device) {
  constexpr int64_t kAlignment = 256;
  const SelectParams& lists = p.select;
  PruneLayout layout;
  layout.list_bytes = static_cast<size_t>(
      round_up(lists.batch * lists.score_heads * lists.keys * dtype_bytes(lists.dtype), kAlignment));
  layout.scratch_bytes =
      std::max(score_cuda_workspace_bytes(p.score, device), select_cuda_workspace_bytes(p.select, device));
  return layout;
}

size_t prune_cuda_workspace_bytes(const PruneParams& params, const CudaDevice& device) {
  return prune_layout(params, device).bytes();
}

Plan plan_prune_cuda(const PruneParams& p, const CudaDevice& device) {
  return plan_of(p, plan_compact_cuda(p.compact, device), device);
}

Plan plan_prune_in_place_cuda(const PruneParams& p, const CudaDevice& device) {
  return plan_of(p, plan_compact_in_place_cuda(p.compact, device), device);
}

}  // namespace csp
