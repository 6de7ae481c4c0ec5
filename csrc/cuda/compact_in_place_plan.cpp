#include "compact_in_place_plan.h"

#include <algorithm>

#include "csp/plan.h"

namespace csp {

CompactInPlaceCut compact_in_place_cut(const CompactParams& p, const void* cache, const Strides& stride,
                                       int64_t dim, const CudaDevice& device) {
  constexpr int64_t kLeastBytes = 64;  // of a slice: what device memory is read in
  constexpr int64_t kBlocks = 4;       // per multiprocessor, where the slices may be as narrow as that
  const int64_t element = p.element_bytes, bytes = dim * element, heads = p.batch * p.num_kv_heads;
  CompactInPlaceCut cut;
  if (bytes == 0 || heads == 0 || p.budget == 0) return cut;
  cut.unit_bytes = vector_bytes(address_of(cache), bytes, stride.batch * element, stride.head * element,
                                stride.row * element);
  cut.row_units = bytes / cut.unit_bytes;
  const int64_t least = kLeastBytes / cut.unit_bytes;  // units
  const int64_t wanted = ceil_div(kBlocks * device.multiprocessors, 2 * heads);
  const int64_t even = round_up(ceil_div(cut.row_units, wanted), least);
  cut.slice_units = std::min({even, cut.row_units, int64_t{kCompactUnits}});
  cut.slices = ceil_div(cut.row_units, cut.slice_units);
  cut.tile_rows = kCompactUnits / cut.slice_units;
  cut.reciprocal = static_cast<uint32_t>(ceil_div(int64_t{1} << kCompactShift, cut.slice_units));
  cut.blocks = heads * cut.slices;
  return cut;
}

Plan plan_compact_in_place_cuda(const CompactParams& p, const CudaDevice&) {
  Plan plan = cost_of(p);
  plan.launches = plan.bytes_written > 0 ? 1 : 0;
  return plan;
}

}  // namespace csp
