#pragma once

#include "csp/segmented_column_sum.h"
#include "launch.h"

// How segmented_column_sum_cuda cuts its problem.
namespace csp {

// All warps of a block sum the same columns: each takes every kColumnSumWarps-th group of rows, whose reads
// are on the way together.
constexpr int kColumnSumWarps = 8;
constexpr int kColumnSumGroup = 8;

// More than one split along O: partial sums in the workspace, [2, splits, B, H, N], self and then cross,
// added by a second kernel.
struct SegmentedColumnSumCut {
  int64_t splits = 0;  // 0: nothing to do
  int64_t rows = 0;    // of attn per split
};

// Never looks at a pointer.
SegmentedColumnSumCut segmented_column_sum_cut(const SegmentedColumnSumParams& params,
                                               const CudaDevice& device);

// Elements per access, where every row allows it: 16 bytes, 4 bytes or one element.
int segmented_column_sum_width(const SegmentedColumnSumParams& params);

}  // namespace csp
