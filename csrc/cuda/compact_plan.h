#pragma once

#include "csp/compact.h"
#include "launch.h"

// How compact_cuda cuts its problem.
namespace csp {

// A block copies at most kCompactUnits vectors ("units") of one head of one cache: whole rows, or one row
// that is longer than that, piece by piece. Each thread has kCompactInFlight of them on the way at once.
constexpr int kCompactThreads = 128;
constexpr int kCompactInFlight = 8;
constexpr int kCompactUnits = kCompactThreads * kCompactInFlight;

// Kernels divide e < kCompactUnits by a row's units u as (e * reciprocal) >> kCompactShift with
// reciprocal = ceil(2^20 / u). That is exact: the reciprocal is less than u / u too large, so the product is
// off by less than e, and e * u < 2^20.
constexpr int kCompactShift = 20;
static_assert(kCompactUnits * kCompactUnits <= 1 << kCompactShift);

// How one of the two caches is copied.
struct CompactCut {
  int unit_bytes = 16;      // 16, 8, 4, 2 or 1
  int64_t row_units = 0;    // of one row
  int64_t block_rows = 0;   // rows of output per block
  uint32_t reciprocal = 0;  // 0 where a block has one row
  int64_t head_blocks = 0;  // blocks per head
  int64_t blocks = 0;       // of the whole cache
};

CompactCut compact_cut(const CompactParams& params, const void* in, const Strides& stride, int64_t dim,
                       const void* out);

}  // namespace csp
