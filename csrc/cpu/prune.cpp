#include "csp/prune.h"

#include "prune_choice.h"
#include "tasks.h"

namespace csp {
namespace {

// Bytes of one score list, [B, Hs, L].
size_t list_bytes(const SelectParams& p) {
  return cache_lines(static_cast<size_t>(p.batch * p.score_heads * p.keys * dtype_bytes(p.dtype)));
}

}  // namespace

size_t prune_cpu_workspace_bytes(const PruneParams& params, int32_t num_threads) {
  const size_t score = score_cpu_workspace_bytes(params.score, num_threads);
  const size_t select = select_cpu_workspace_bytes(params.select, num_threads);
  // The parts run one after another and share their scratch.
  return 2 * list_bytes(params.select) + (score > select ? score : select);
}

void score_and_select_cpu(const PruneParams& params, void* workspace, const Parallel& parallel) {
  ScoreParams score = params.score;
  SelectParams select = params.select;
  char* const self = static_cast<char*>(workspace);
  char* const cross = self + list_bytes(select);
  char* const scratch = cross + list_bytes(select);
  score.self = self;
  score.cross = cross;
  select.self = self;
  select.cross = cross;
  score_cpu(score, scratch, parallel);
  select_cpu(select, scratch, parallel);
}

void prune_cpu(const PruneParams& params, void* workspace, const Parallel& parallel) {
  score_and_select_cpu(params, workspace, parallel);
  compact_cpu(params.compact, parallel);
}

}  // namespace csp
