#include "select_plan.h"

#include "csp/plan.h"

namespace csp {
namespace {

constexpr int64_t kStaticShared = 2 << 10;  // more than the kernel declares

// A block per row. Says no where the shared memory does not even hold the bins.
bool plan_blocks(const SelectParams& p, const CudaDevice& device, SelectPlan& plan) {
  const bool ranks = plan.rule == SelectRule::kRanks;
  const int64_t rows = p.batch * p.score_heads;
  plan.spare = ranks || p.pool != Pool::kNone;
  plan.bins = select_bins(p.keys, ranks);
  const int64_t always = 4 * plan.bins + round_up(4 * ceil_div(p.keys, 32), 16) + kStaticShared;
  const int64_t row_bytes = select_row_bytes(p.keys, plan.spare);
  if (always > device.shared_bytes) return false;
  plan.in_shared = always + row_bytes <= device.shared_bytes;
  plan.shape.shared_bytes = always - kStaticShared + (plan.in_shared ? row_bytes : 0);
  // Few or long rows: more threads for each. Many: more rows at a time.
  const bool wide = plan.in_shared && (rows <= device.multiprocessors || p.keys > 8192);
  plan.shape.threads = wide ? 1024 : 512;
  const int64_t most = plan.in_shared ? int64_t{1} << 20 : 2 * device.multiprocessors;
  plan.shape.x = rows < most ? rows : most;
  plan.row_bytes = plan.in_shared ? 0 : row_bytes;
  plan.workspace_bytes = plan.shape.x * plan.row_bytes;
  plan.launches = rows > 0 ? 1 : 0;
  return true;
}

}  // namespace

SelectRule select_rule(const SelectParams& p) {
  if (p.k_self >= 0) return SelectRule::kLiteral;
  if (p.rho_thousandths == 0 || p.rho_thousandths == 1000) return SelectRule::kOneList;
  return p.combine == Combine::kCalibrated ? SelectRule::kCalibrated : SelectRule::kRanks;
}

SelectPlan make_select_plan(const SelectParams& p, const CudaDevice& device, const SelectLimits& limits) {
  SelectPlan plan;
  plan.rule = select_rule(p);
  const int64_t most = limits.block_keys < kSelectMaxBlockKeys ? limits.block_keys : kSelectMaxBlockKeys;
  plan.by_block = p.keys <= most && plan_blocks(p, device, plan);
  return plan;
}

size_t select_cuda_workspace_bytes(const SelectParams& params, const CudaDevice& device) {
  return static_cast<size_t>(make_select_plan(params, device).workspace_bytes);
}

Plan plan_select_cuda(const SelectParams& p, const CudaDevice& device) {
  const SelectPlan own = make_select_plan(p, device);
  const int64_t rows = p.batch * p.score_heads;
  Plan plan;
  plan.workspace_bytes = own.workspace_bytes;
  plan.bytes_read = 2 * rows * p.keys * dtype_bytes(p.dtype) + p.batch * (p.keys + p.window);
  plan.bytes_written = rows * (p.budget + 1) * static_cast<int64_t>(sizeof(int32_t));
  plan.launches = own.launches;
  return plan;
}

}  // namespace csp
