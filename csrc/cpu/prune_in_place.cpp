#include "csp/prune_in_place.h"

#include "prune_choice.h"

namespace csp {

void prune_in_place_cpu(const PruneParams& params, void* workspace, const Parallel& parallel) {
  score_and_select_cpu(params, workspace, parallel);
  compact_in_place_cpu(params.compact, parallel);
}

}  // namespace csp
