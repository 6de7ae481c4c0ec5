#pragma once

#include "csp/decode.h"
#include "csp/prune.h"

namespace csp {

// What one call of an op costs on the CPU, known before it runs. Only the shape and the options of the
// params are looked at, never a pointer, except whether score.lse is null.
struct Plan {
  int64_t workspace_bytes = 0;  // scratch that the caller hands over, inputs and outputs apart
  int64_t bytes_read = 0;       // every input once, rows that are not copied left out
  int64_t bytes_written = 0;    // every output once
  int64_t flops = 0;  // multiplications and additions of the matrix products, as if nothing were masked
  int64_t tasks = 0;  // independent pieces of work: no more threads than this can help
};

Plan plan_score_cpu(const ScoreParams& params, int32_t num_threads);
Plan plan_select_cpu(const SelectParams& params, int32_t num_threads);
Plan plan_compact_cpu(const CompactParams& params);
Plan plan_decode_cpu(const DecodeParams& params, int32_t num_threads);

// The parts added up: the scores are written by the first part and read by the second.
Plan plan_prune_cpu(const PruneParams& params, int32_t num_threads);

}  // namespace csp
