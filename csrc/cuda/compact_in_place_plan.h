#pragma once

#include "compact_plan.h"
#include "csp/compact_in_place.h"

// How compact_in_place_cuda cuts its problem.
namespace csp {

// The columns of a cache know nothing of each other, so a row is cut into slices, and a block moves one slice
// of all rows of one head: nobody else reads or writes there. It goes through them tile by tile, at most
// kCompactUnits vectors ("units") each, all loads of a tile before its first store.
constexpr int kCompactInPlaceThreads = 256;
constexpr int kCompactInPlaceInFlight = kCompactUnits / kCompactInPlaceThreads;

struct CompactInPlaceCut {
  int unit_bytes = 16;      // 16, 8, 4, 2 or 1
  int64_t row_units = 0;    // of one row
  int64_t slice_units = 0;  // of one row's slice; the last one may have fewer
  int64_t slices = 0;       // of a row: blocks per head
  int64_t tile_rows = 0;    // rows of a tile
  uint32_t reciprocal = 0;  // of slice_units, as kCompactShift says
  int64_t blocks = 0;       // of the whole cache
};

CompactInPlaceCut compact_in_place_cut(const CompactParams& params, const void* cache, const Strides& stride,
                                       int64_t dim, const CudaDevice& device);

}  // namespace csp
