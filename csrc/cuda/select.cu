#include "csp/select.h"
#include "select_plan.h"
#include "select_row.cuh"
#include "select_sort.cuh"

namespace csp {
namespace {

template <bool kRanks>
CudaStatus launch_rows(const SelectParams& p, const SelectPlan& plan, const CudaContext& context) {
  const auto kernel = !plan.in_shared             ? select_row_kernel<512, false, kRanks>
                      : plan.shape.threads == 512 ? select_row_kernel<512, true, kRanks>
                                                  : select_row_kernel<1024, true, kRanks>;
  return launch(context, plan.shape, "select_row_kernel", kernel, p, plan, context.workspace);
}

}  // namespace

CudaStatus launch_select(const SelectParams& p, const SelectPlan& plan, const CudaContext& context) {
  if (p.dtype == DType::kFloat64) return kFloat64Refused;
  if (p.batch == 0 || p.score_heads == 0) return {};
  const CudaStatus room = check_workspace(context, static_cast<size_t>(plan.workspace_bytes));
  if (!room.ok()) return room;
  if (!plan.by_block) return SortLauncher(p, plan, context).run();
  return plan.rule == SelectRule::kRanks ? launch_rows<true>(p, plan, context)
                                         : launch_rows<false>(p, plan, context);
}

CudaStatus select_cuda(const SelectParams& params, const CudaContext& context) {
  return launch_select(params, make_select_plan(params, context.device), context);
}

}  // namespace csp
