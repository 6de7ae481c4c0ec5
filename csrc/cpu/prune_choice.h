#pragma once

#include "csp/prune.h"

namespace csp {

// What prune and prune_in_place begin with: both score lists and the scratch of the parts lie in the
// workspace.
void score_and_select_cpu(const PruneParams& params, void* workspace, const Parallel& parallel);

}  // namespace csp
