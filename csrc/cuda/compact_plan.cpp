#include "compact_plan.h"

#include "csp/plan.h"

namespace csp {

CompactCut compact_cut(const CompactParams& p, const void* in, const Strides& stride, int64_t dim,
                       const void* out) {
  const int64_t element = p.element_bytes, bytes = dim * element;
  CompactCut cut;
  if (bytes == 0) return cut;
  cut.unit_bytes = vector_bytes(address_of(in), address_of(out), bytes, stride.batch * element,
                                stride.head * element, stride.row * element);
  cut.row_units = bytes / cut.unit_bytes;
  cut.block_rows = cut.row_units < kCompactUnits ? kCompactUnits / cut.row_units : 1;
  if (cut.block_rows > 1)
    cut.reciprocal = static_cast<uint32_t>(ceil_div(int64_t{1} << kCompactShift, cut.row_units));
  cut.head_blocks = ceil_div(p.budget, cut.block_rows);
  cut.blocks = p.batch * p.num_kv_heads * cut.head_blocks;
  return cut;
}

Plan plan_compact_cuda(const CompactParams& p, const CudaDevice&) {
  Plan plan = cost_of(p);
  plan.launches = plan.bytes_written > 0 ? 1 : 0;
  return plan;
}

}  // namespace csp
