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
  const bool wide = plan.in_shared && p.keys > (rows <= device.multiprocessors ? 2048 : 8192);
  plan.shape.threads = wide ? 1024 : 512;
  const int64_t most = plan.in_shared ? int64_t{1} << 20 : 2 * device.multiprocessors;
  plan.shape.x = rows < most ? rows : most;
  plan.row_bytes = plan.in_shared ? 0 : row_bytes;
  plan.workspace_bytes = plan.shape.x * plan.row_bytes;
  plan.launches = rows > 0 ? 1 : 0;
  return true;
}

int64_t sort_launches(const SelectPlan& plan) {
  constexpr int64_t kPass = 3, kTiePasses = 4, kListPasses = 4;
  constexpr int64_t kKeysRanksAndSlots = 3;
  const int64_t sorts = kPass * (kTiePasses + kListPasses);
  switch (plan.rule) {
    case SelectRule::kCalibrated:  // and the sums
    case SelectRule::kLiteral:
      return sorts + kKeysRanksAndSlots + (plan.rule == SelectRule::kCalibrated);
    case SelectRule::kOneList:
    case SelectRule::kRanks:  // and the final keys, their order, its ranks
      return sorts + kKeysRanksAndSlots + 1 + kPass * plan.final_passes + 1;
  }
  return 0;
}

void plan_sorts(const SelectParams& p, const SelectLimits& limits, SelectPlan& plan) {
  const int64_t rows = p.batch * p.score_heads;
  if (rows == 0) return;
  const int64_t fit = limits.group_keys / p.keys;
  plan.rows = fit < 1 ? 1 : fit < rows ? fit : rows;
  plan.tiles = ceil_div(p.keys, kSortTile);
  plan.lists = plan.rule == SelectRule::kCalibrated ? 1 : 2;
  for (int64_t last = 2 * p.keys + 1; last > 0; last >>= kSortBits) ++plan.final_passes;

  SortLayout& at = plan.layout;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at.bytes;
    at.bytes += round_up(bytes, 256);
    return begin;
  };
  const int64_t words = 4 * plan.rows * p.keys;
  at.outlines = take(4 * p.batch * kOutlineWords);
  at.positions = take(4 * p.batch * p.keys);
  at.tie = take(words);
  at.keys = take(2 * words);
  at.tie_order = take(words);
  for (int64_t& order : at.orders) order = take(plan.lists * words);
  at.counts = take(4 * plan.lists * plan.rows * (plan.tiles << kSortBits));
  at.sums = take(16 * plan.rows * plan.tiles);
  plan.workspace_bytes = at.bytes;
  plan.launches = 1 + ceil_div(rows, plan.rows) * sort_launches(plan);
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
  if (!plan.by_block) plan_sorts(p, limits, plan);
  return plan;
}

size_t select_cuda_workspace_bytes(const SelectParams& params, const CudaDevice& device) {
  return static_cast<size_t>(make_select_plan(params, device).workspace_bytes);
}

Plan plan_select_cuda(const SelectParams& p, const CudaDevice& device) {
  const SelectPlan own = make_select_plan(p, device);
  Plan plan = cost_of(p);
  plan.workspace_bytes = own.workspace_bytes;
  plan.launches = own.launches;
  return plan;
}

}  // namespace csp
