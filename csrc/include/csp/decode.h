#pragma once

#include "csp/cuda.h"
#include "csp/parallel.h"
#include "csp/types.h"

namespace csp {

// Attention of the Q newest queries over a pruned cache, n-softmax included.
// Row (b, h) sees slots start <= s < end - Q + 1 + i for query i; start and end are clamped to [0, C].
struct DecodeParams {
  DType dtype = DType::kFloat32;  // of query, key, value and out; lse has accumulate_dtype(dtype)
  const void* query = nullptr;    // [B, Hq, Q, D], unit stride in D
  Strides query_stride;
  const void* key = nullptr;  // [B, Hkv, C, D], unit stride in D
  Strides key_stride;
  const void* value = nullptr;  // [B, Hkv, C, D], unit stride in D
  Strides value_stride;
  const int32_t* start = nullptr;  // null: 0; element (b, h) at start[b * start_batch + h * start_head]
  int64_t start_batch = 0;
  int64_t start_head = 0;
  const int32_t* end = nullptr;  // one value, read when the kernel runs; null: capacity
  void* out = nullptr;           // [B, Hq, Q, D], contiguous
  void* lse = nullptr;           // [B, Hq, Q], contiguous, natural log, without n
  int64_t batch = 0;
  int64_t num_heads = 0;     // Hq
  int64_t num_kv_heads = 0;  // Hkv, divides Hq
  int64_t queries = 0;       // Q, 1..8
  int64_t capacity = 0;      // C
  int64_t head_dim = 0;      // D
  double n = 1.0;
  double scale = 1.0;
};

// Independent pieces that decode_cpu cuts the problem into, whatever the number of threads.
int64_t decode_cpu_tasks(const DecodeParams& params);

size_t decode_cpu_workspace_bytes(const DecodeParams& params, int32_t num_threads);

void decode_cpu(const DecodeParams& params, void* workspace, const Parallel& parallel = {});

size_t decode_cuda_workspace_bytes(const DecodeParams& params, const CudaDevice& device);
CudaStatus decode_cuda(const DecodeParams& params, const CudaContext& context);

}  // namespace csp
