#pragma once

#include "csp/select.h"
#include "isa.h"

namespace csp {

// One worker's scratch, for as many candidates as there are keys. Real is the accumulation type of the
// scores.
struct SelectScratch {
  int32_t* position;  // of each candidate, ascending
  uint8_t* valid;     // which lists a candidate is valid in
  uint8_t* state;     // what happened to a candidate so far
  void* self;         // Real, unpooled
  void* cross;        // Real, unpooled
  void* tie;          // Real
  void* pooled_self;  // Real; self where nothing is pooled
  void* pooled_cross;
  void* entries[2];  // Entry<Real>
  int32_t* order[2];
};

}  // namespace csp

// Heads [head_begin, head_end) of one batch row of csp::select_cpu.
CSP_DECLARE_KERNEL(void, select_heads,
                   (const SelectParams& params, int64_t batch, int64_t head_begin, int64_t head_end,
                    const SelectScratch& scratch))
