#include "csp/prune.h"

#include "launch.h"
#include "prune_plan.h"

namespace csp {

CudaStatus score_and_select_cuda(const PruneParams& params, const CudaContext& context) {
  if (params.score.dtype == DType::kFloat64) return kFloat64Refused;
  const PruneLayout layout = prune_layout(params, context.device);
  const CudaStatus room = check_workspace(context, layout.bytes());
  if (!room.ok()) return room;
  ScoreParams score = params.score;
  SelectParams select = params.select;
  char* const self = static_cast<char*>(context.workspace);
  char* const cross = self + layout.list_bytes;
  score.self = self;
  score.cross = cross;
  select.self = self;
  select.cross = cross;
  CudaContext part = context;
  part.workspace = cross + layout.list_bytes;
  part.workspace_bytes = layout.scratch_bytes;

  const CudaStatus scored = score_cuda(score, part);
  if (!scored.ok()) return scored;
  return select_cuda(select, part);
}

CudaStatus prune_cuda(const PruneParams& params, const CudaContext& context) {
  const CudaStatus chosen = score_and_select_cuda(params, context);
  return chosen.ok() ? compact_cuda(params.compact, context) : chosen;
}

}  // namespace csp
