#pragma once

#include "csp/compact_in_place.h"
#include "csp/prune.h"

namespace csp {

// prune within the caches: score, select and compact_in_place in one call, bit-identical to the chain.
// params.compact is what compact_in_place takes; the rest and the workspace are those of prune:
// prune_cpu_workspace_bytes and prune_cuda_workspace_bytes.

// `workspace` holds prune_cpu_workspace_bytes(params, parallel.num_threads) bytes, 64-byte aligned.
void prune_in_place_cpu(const PruneParams& params, void* workspace, const Parallel& parallel = {});

// The chain on one stream, one after another in one workspace.
CudaStatus prune_in_place_cuda(const PruneParams& params, const CudaContext& context);

}  // namespace csp
