#pragma once

#include "csp/cuda.h"
#include "csp/parallel.h"
#include "csp/types.h"

namespace csp {

// Column sums of a materialised attention matrix, split by modality (CSP Eq. 1):
// self[j] sums the rows whose query has key j's modality, cross[j] those of any other modality.
struct SegmentedColumnSumParams {
  DType dtype = DType::kFloat32;           // of attn; the sums have accumulate_dtype(dtype)
  const void* attn = nullptr;              // [B, H, O, N], unit stride in N
  Strides attn_stride;                     // batch, head, query
  const int8_t* query_modality = nullptr;  // [B, O], contiguous; < 0: does not observe
  const int8_t* key_modality = nullptr;    // [B, N], contiguous; < 0: padding, sums stay 0
  void* self = nullptr;                    // [B, H, N], contiguous
  void* cross = nullptr;                   // [B, H, N], contiguous
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t window = 0;  // O
  int64_t keys = 0;    // N
};

// Independent pieces that segmented_column_sum_cpu cuts the problem into, whatever the number of threads.
int64_t segmented_column_sum_cpu_tasks(const SegmentedColumnSumParams& params);

void segmented_column_sum_cpu(const SegmentedColumnSumParams& params, const Parallel& parallel = {});

size_t segmented_column_sum_cuda_workspace_bytes(const SegmentedColumnSumParams& params,
                                                 const CudaDevice& device);
CudaStatus segmented_column_sum_cuda(const SegmentedColumnSumParams& params, const CudaContext& context);

}  // namespace csp
