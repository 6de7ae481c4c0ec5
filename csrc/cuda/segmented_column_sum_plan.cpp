#include "segmented_column_sum_plan.h"

#include "csp/plan.h"

namespace csp {

SegmentedColumnSumCut segmented_column_sum_cut(const SegmentedColumnSumParams& p, const CudaDevice& device) {
  // Enough blocks to end at about the same time on all multiprocessors; with fewer rows than this the second
  // launch would cost more than the splits save.
  constexpr int64_t kBlocksPerMultiprocessor = 8, kLeastRows = 512;
  constexpr int64_t kStep = kColumnSumWarps * kColumnSumGroup;
  SegmentedColumnSumCut cut;
  const int64_t blocks = p.batch * p.num_heads * ceil_div(p.keys * dtype_bytes(p.dtype), 32 * 16);
  if (blocks == 0) return cut;
  int64_t splits = kBlocksPerMultiprocessor * device.multiprocessors / blocks;
  if (splits > p.window / kLeastRows) splits = p.window / kLeastRows;
  if (splits < 1) splits = 1;
  cut.rows = round_up(ceil_div(p.window, splits), kStep);
  cut.splits = p.window > 0 ? ceil_div(p.window, cut.rows) : 1;
  return cut;
}

int segmented_column_sum_width(const SegmentedColumnSumParams& p) {
  const int64_t element = dtype_bytes(p.dtype);
  const int bytes = vector_bytes(address_of(p.attn), p.attn_stride.batch * element,
                                 p.attn_stride.head * element, p.attn_stride.row * element, p.keys * element);
  return bytes == 16 ? static_cast<int>(16 / element) : bytes >= 4 ? static_cast<int>(4 / element) : 1;
}

size_t segmented_column_sum_cuda_workspace_bytes(const SegmentedColumnSumParams& p,
                                                 const CudaDevice& device) {
  const SegmentedColumnSumCut cut = segmented_column_sum_cut(p, device);
  if (cut.splits <= 1) return 0;
  return static_cast<size_t>(2 * cut.splits * p.batch * p.num_heads * p.keys) * sizeof(float);
}

Plan plan_segmented_column_sum_cuda(const SegmentedColumnSumParams& p, const CudaDevice& device) {
  const int64_t columns = p.batch * p.num_heads * p.keys;
  const SegmentedColumnSumCut cut = segmented_column_sum_cut(p, device);
  Plan plan;
  plan.workspace_bytes = static_cast<int64_t>(segmented_column_sum_cuda_workspace_bytes(p, device));
  plan.bytes_read = columns * p.window * dtype_bytes(p.dtype) + p.batch * (p.window + p.keys);
  plan.bytes_written = 2 * columns * static_cast<int64_t>(sizeof(float));
  plan.launches = cut.splits > 1 ? 2 : cut.splits;
  return plan;
}

}  // namespace csp
