#include "csp/segmented_column_sum.h"

#include "segmented_column_sum_kernel.h"
#include "tasks.h"

namespace csp {
namespace {

// Columns per task: both sums of a block stay in the first-level cache, and a row's piece is long enough for
// the hardware to fetch ahead.
constexpr int64_t kColumns = 1024;

int64_t pieces_of(const SegmentedColumnSumParams& p) {
  return (p.keys + kColumns - 1) / kColumns;
}

}  // namespace

int64_t segmented_column_sum_cpu_tasks(const SegmentedColumnSumParams& p) {
  return p.batch * p.num_heads * pieces_of(p);
}

void segmented_column_sum_cpu(const SegmentedColumnSumParams& p, const Parallel& parallel) {
  const int64_t pieces = pieces_of(p);
  for_each_task(parallel, segmented_column_sum_cpu_tasks(p), [&](int64_t task, int32_t) {
    const int64_t row = task / pieces;  // of [B, H]
    const int64_t begin = task % pieces * kColumns;
    const int64_t end = begin + kColumns < p.keys ? begin + kColumns : p.keys;
    CSP_CALL_KERNEL(segmented_column_sum_columns, p, row / p.num_heads, row % p.num_heads, begin, end);
  });
}

}  // namespace csp
