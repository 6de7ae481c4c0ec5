#pragma once

#include "csp/compact.h"
#include "csp/score.h"
#include "csp/select.h"

namespace csp {

// score, select and compact in one call, bit-identical to the chain. The scores stay in the workspace:
// score.self, score.cross, select.self and select.cross are not looked at; compact.indices is
// select.indices.
struct PruneParams {
  ScoreParams score;
  SelectParams select;
  CompactParams compact;
};

// Both score lists, and the scratch of the part that needs most.
size_t prune_cpu_workspace_bytes(const PruneParams& params, int32_t num_threads);

// `workspace` holds prune_cpu_workspace_bytes(params, parallel.num_threads) bytes, 64-byte aligned.
void prune_cpu(const PruneParams& params, void* workspace, const Parallel& parallel = {});

size_t prune_cuda_workspace_bytes(const PruneParams& params, const CudaDevice& device);

// The chain on one stream, one after another in one workspace.
CudaStatus prune_cuda(const PruneParams& params, const CudaContext& context);

}  // namespace csp
