#pragma once

#include "csp/compact.h"
#include "csp/score.h"
#include "csp/select.h"

namespace csp {

// score, select and compact in one call, bit-identical to the chain. The scores stay in the workspace:
// score.self, score.cross, select.self and select.cross are set by prune_cpu.
struct PruneParams {
  ScoreParams score;
  SelectParams select;
  CompactParams compact;
};

size_t prune_cpu_workspace_bytes(const PruneParams& params, int32_t num_threads);
void prune_cpu(const PruneParams& params, void* workspace, const Parallel& parallel = {});

}  // namespace csp
