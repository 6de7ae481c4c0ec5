#pragma once

#include "csp/decode.h"
#include "csp/dual_top_k.h"
#include "csp/n_softmax.h"
#include "csp/prune_in_place.h"
#include "csp/segmented_column_sum.h"

namespace csp {

// What one call of an op costs, known before it runs. Only the shape and the options of the
// params are looked at, never a pointer, except whether an optional input is null.
struct Plan {
  int64_t workspace_bytes = 0;  // scratch that the caller hands over, inputs and outputs apart
  int64_t bytes_read = 0;       // every input once, rows that are not copied left out
  int64_t bytes_written = 0;    // every output once
  int64_t flops = 0;     // multiplications and additions of the matrix products, as if nothing were masked
  int64_t tasks = 0;     // CPU: independent pieces of work: no more threads than this can help
  int64_t launches = 0;  // CUDA: kernels on the stream
};

// The bytes and operations of a call alone: they are the same on every device.
inline Plan cost_of(const ScoreParams& p) {
  const int64_t element = dtype_bytes(p.dtype), real = dtype_bytes(accumulate_dtype(p.dtype));
  const int64_t queries = p.batch * p.num_heads * p.window;
  const int64_t score_heads = p.heads == Heads::kShared ? 1 : p.num_kv_heads;
  Plan plan;
  plan.bytes_read = (queries + p.batch * p.num_kv_heads * p.keys) * p.head_dim * element +
                    p.batch * (p.keys + p.window) + (p.lse != nullptr ? queries * real : 0);
  plan.bytes_written = 2 * p.batch * score_heads * p.keys * real;
  plan.flops = 2 * queries * p.keys * p.head_dim;
  return plan;
}

inline Plan cost_of(const SelectParams& p) {
  const int64_t rows = p.batch * p.score_heads;
  Plan plan;
  plan.bytes_read = 2 * rows * p.keys * dtype_bytes(p.dtype) + p.batch * (p.keys + p.window);
  plan.bytes_written = rows * (p.budget + 1) * static_cast<int64_t>(sizeof(int32_t));
  return plan;
}

// In place as well: there it is what is moved at most.
inline Plan cost_of(const CompactParams& p) {
  const int64_t rows = p.batch * p.num_kv_heads * p.budget;
  Plan plan;
  plan.bytes_written = rows * (p.head_dim + p.value_dim) * p.element_bytes;
  plan.bytes_read =
      plan.bytes_written + p.batch * p.score_heads * p.budget * static_cast<int64_t>(sizeof(int32_t));
  return plan;
}

inline Plan cost_of(const DecodeParams& p) {
  const int64_t element = dtype_bytes(p.dtype), real = dtype_bytes(accumulate_dtype(p.dtype));
  const int64_t queries = p.batch * p.num_heads * p.queries;
  Plan plan;
  plan.bytes_read = (queries + 2 * p.batch * p.num_kv_heads * p.capacity) * p.head_dim * element;
  plan.bytes_written = queries * (p.head_dim * element + real);
  plan.flops = 4 * queries * p.capacity * p.head_dim;
  return plan;
}

Plan plan_score_cpu(const ScoreParams& params, int32_t num_threads);
Plan plan_select_cpu(const SelectParams& params, int32_t num_threads);
Plan plan_compact_cpu(const CompactParams& params);
Plan plan_compact_in_place_cpu(const CompactParams& params);
Plan plan_decode_cpu(const DecodeParams& params, int32_t num_threads);

// The parts added up: the scores are written by the first part and read by the second.
Plan plan_prune_cpu(const PruneParams& params, int32_t num_threads);
Plan plan_prune_in_place_cpu(const PruneParams& params, int32_t num_threads);

// The same on a GPU; `device` need not be there.
Plan plan_n_softmax_cuda(const NSoftmaxParams& params, const CudaDevice& device);
Plan plan_segmented_column_sum_cuda(const SegmentedColumnSumParams& params, const CudaDevice& device);
Plan plan_score_cuda(const ScoreParams& params, const CudaDevice& device);
Plan plan_dual_top_k_cuda(const DualTopKParams& params, const CudaDevice& device);
Plan plan_select_cuda(const SelectParams& params, const CudaDevice& device);
Plan plan_compact_cuda(const CompactParams& params, const CudaDevice& device);
Plan plan_compact_in_place_cuda(const CompactParams& params, const CudaDevice& device);
Plan plan_decode_cuda(const DecodeParams& params, const CudaDevice& device);
Plan plan_prune_cuda(const PruneParams& params, const CudaDevice& device);
Plan plan_prune_in_place_cuda(const PruneParams& params, const CudaDevice& device);

}  // namespace csp
