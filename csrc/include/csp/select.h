#pragma once

#include "csp/cuda.h"
#include "csp/parallel.h"
#include "csp/types.h"

namespace csp {

// Which keys a row keeps: the last `recent` real tokens and the best candidates, exactly `budget` slots.
// A row with fewer real tokens than the budget keeps them all; free slots stand at the left as -1.
struct SelectParams {
  DType dtype = DType::kFloat32;           // of self and cross
  const void* self = nullptr;              // [B, Hs, L], contiguous
  const void* cross = nullptr;             // [B, Hs, L], contiguous
  const int8_t* modality = nullptr;        // [B, L], contiguous; < 0: padding
  const int8_t* query_modality = nullptr;  // [B, O], contiguous; < 0: does not observe
  int32_t* indices = nullptr;              // [B, Hs, T], contiguous, ascending, -1 first
  int32_t* lengths = nullptr;              // [B, Hs], contiguous
  int64_t batch = 0;
  int64_t score_heads = 0;        // Hs
  int64_t keys = 0;               // L
  int64_t window = 0;             // O
  int64_t budget = 0;             // T
  int64_t recent = 0;             // R <= T
  int64_t k_self = -1;            // -1: exact budget; otherwise the literal masks of Eq. 2-3,
  int64_t k_cross = -1;           // which with the recent ones fit into the budget
  int32_t rho_thousandths = 500;  // cross_ratio * 1000, rounded
  Combine combine = Combine::kIntersection;
  Pool pool = Pool::kNone;
  int64_t pool_kernel = 7;  // odd; kPast takes the half before a candidate, and the candidate
  bool causal = true;
};

size_t select_cpu_workspace_bytes(const SelectParams& params, int32_t num_threads);

// Independent pieces that select_cpu cuts the problem into, whatever the number of threads.
int64_t select_cpu_tasks(const SelectParams& params);

void select_cpu(const SelectParams& params, void* workspace, const Parallel& parallel = {});

size_t select_cuda_workspace_bytes(const SelectParams& params, const CudaDevice& device);
CudaStatus select_cuda(const SelectParams& params, const CudaContext& context);

}  // namespace csp
