#pragma once

#include "csp/cuda.h"
#include "csp/parallel.h"
#include "csp/types.h"

namespace csp {

// The literal masks of CSP Eq. 2-3: top-k_self of `self` and top-k_cross of `cross`, intersected or united.
// Equal scores: the later position. An invalid key is never selected.
struct DualTopKParams {
  DType dtype = DType::kFloat32;      // of self and cross
  const void* self = nullptr;         // [rows, N], contiguous
  const void* cross = nullptr;        // [rows, N], contiguous
  const bool* valid_self = nullptr;   // [rows, N], contiguous; null: every key is valid
  const bool* valid_cross = nullptr;  // [rows, N], contiguous; null: every key is valid
  bool* mask = nullptr;               // [rows, N], contiguous
  int64_t rows = 0;
  int64_t keys = 0;
  int64_t k_self = 0;                        // >= 0, clamped to the valid keys of the row
  int64_t k_cross = 0;                       // >= 0, clamped to the valid keys of the row
  Combine combine = Combine::kIntersection;  // kIntersection or kUnion
};

size_t dual_top_k_cpu_workspace_bytes(const DualTopKParams& params, int32_t num_threads);
void dual_top_k_cpu(const DualTopKParams& params, void* workspace, const Parallel& parallel = {});

size_t dual_top_k_cuda_workspace_bytes(const DualTopKParams& params, const CudaDevice& device);
CudaStatus dual_top_k_cuda(const DualTopKParams& params, const CudaContext& context);

}  // namespace csp
