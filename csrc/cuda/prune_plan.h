#pragma once

#include "csp/prune.h"

namespace csp {

// The workspace of prune and prune_in_place: both score lists, then the scratch that its parts use one after
// another.
struct PruneLayout {
  size_t list_bytes = 0;  // of one list [B, Hs, L]
  size_t scratch_bytes = 0;

  size_t bytes() const { return 2 * list_bytes + scratch_bytes; }
};

PruneLayout prune_layout(const PruneParams& params, const CudaDevice& device);

// What prune and prune_in_place begin with, in that workspace; compaction needs none.
CudaStatus score_and_select_cuda(const PruneParams& params, const CudaContext& context);

}  // namespace csp
