#include "dual_top_k_plan.h"

#include "csp/plan.h"

namespace csp {

LaunchShape dual_top_k_shape(const DualTopKParams& params) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  LaunchShape shape;
  shape.x = params.rows < kMaxBlocks ? params.rows : kMaxBlocks;
  shape.threads = kDualTopKThreads;
  return shape;
}

size_t dual_top_k_cuda_workspace_bytes(const DualTopKParams&, const CudaDevice&) {
  return 0;
}

Plan plan_dual_top_k_cuda(const DualTopKParams& p, const CudaDevice&) {
  const int64_t masks = (p.valid_self != nullptr) + (p.valid_cross != nullptr);
  Plan plan;
  plan.bytes_written = p.rows * p.keys;
  plan.bytes_read = plan.bytes_written * (2 * dtype_bytes(p.dtype) + masks);
  plan.launches = plan.bytes_written > 0 ? 1 : 0;
  return plan;
}

}  // namespace csp
