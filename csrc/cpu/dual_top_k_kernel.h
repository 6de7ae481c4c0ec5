#pragma once

#include "csp/dual_top_k.h"
#include "isa.h"

namespace csp {

// One worker's scratch, for one row.
struct DualTopKScratch {
  void* entries[2];  // Entry<Real>
  int32_t* order;
};

}  // namespace csp

// One row of csp::dual_top_k_cpu.
CSP_DECLARE_KERNEL(void, dual_top_k_row,
                   (const DualTopKParams& params, int64_t row, const DualTopKScratch& scratch))
