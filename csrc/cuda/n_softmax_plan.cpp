#include "n_softmax_plan.h"

#include "csp/plan.h"

namespace csp {

NSoftmaxCut n_softmax_cut(const NSoftmaxParams& p, const CudaDevice& device) {
  NSoftmaxCut cut;
  if (p.rows == 0 || p.cols == 0) return cut;
  const uint64_t in = address_of(p.logits), out = address_of(p.out);
  cut.vectors = vector_bytes(in - out) == 16;
  cut.lead = static_cast<int>(in % 16) / static_cast<int>(dtype_bytes(p.dtype));
  const auto fits = [&](const NSoftmaxTier& tier) { return p.cols <= tier.team * tier.values; };
  while (cut.tier < kNSoftmaxTierCount && !(cut.vectors && fits(kNSoftmaxTiers[cut.tier]))) ++cut.tier;
  if (cut.tier < kNSoftmaxTierCount) {
    cut.blocks = ceil_div(p.rows, kNSoftmaxTiers[cut.tier].threads / kNSoftmaxTiers[cut.tier].team);
  } else {
    const int64_t most = int64_t{16} * device.multiprocessors;
    cut.blocks = p.rows < most ? p.rows : most;
  }
  return cut;
}

Plan plan_n_softmax_cuda(const NSoftmaxParams& p, const CudaDevice&) {
  Plan plan;
  plan.bytes_read = plan.bytes_written = p.rows * p.cols * dtype_bytes(p.dtype);
  plan.launches = plan.bytes_read > 0 ? 1 : 0;
  return plan;
}

}  // namespace csp
