#include "csp/prune_in_place.h"

#include "prune_plan.h"

namespace csp {

CudaStatus prune_in_place_cuda(const PruneParams& params, const CudaContext& context) {
  const CudaStatus chosen = score_and_select_cuda(params, context);
  return chosen.ok() ? compact_in_place_cuda(params.compact, context) : chosen;
}

}  // namespace csp
