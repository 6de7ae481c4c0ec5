#pragma once

#include "csp/cuda.h"
#include "csp/parallel.h"
#include "csp/types.h"

namespace csp {

// Self and cross column sums of the window's n-softmax attention, from query and key (CSP Eq. 1 and 7).
// P = exp(scale q.k - lse) * sigmoid(lse - log n), lse over every visible key; a key is visible when its
// modality is >= 0 and, if causal, it stands at or before the query (query i at keys - window + i).
struct ScoreParams {
  DType dtype = DType::kFloat32;  // of query and key; sums and lse have accumulate_dtype(dtype)
  const void* query = nullptr;    // [B, Hq, O, D], unit stride in D
  Strides query_stride;
  const void* key = nullptr;  // [B, Hkv, L, D], unit stride in D
  Strides key_stride;
  const int8_t* modality = nullptr;        // [B, L], contiguous; < 0: padding
  const int8_t* query_modality = nullptr;  // [B, O], contiguous; < 0: does not observe
  const void* lse = nullptr;               // [B, Hq, O], contiguous, natural log, without n; may be null
  void* self = nullptr;                    // [B, Hs, L], contiguous, Hs = Hkv (kKv) or 1 (kShared)
  void* cross = nullptr;                   // [B, Hs, L], contiguous
  int64_t batch = 0;
  int64_t num_heads = 0;     // Hq
  int64_t num_kv_heads = 0;  // Hkv, divides Hq
  int64_t window = 0;        // O <= L
  int64_t keys = 0;          // L
  int64_t head_dim = 0;      // D
  double n = 1.0;
  double scale = 1.0;
  Heads heads = Heads::kKv;
  bool causal = true;
};

// Scratch bytes that score_cpu needs, never O(O * L) per head: a tile of 16 * L floats per thread (none where
// lse is given) and, where one output row is the sum of several tasks, 2 * L floats for each of at most
// B * Hkv + 64 tasks.
size_t score_cpu_workspace_bytes(const ScoreParams& params, int32_t num_threads);

// Independent pieces that score_cpu cuts the problem into, whatever the number of threads.
int64_t score_cpu_tasks(const ScoreParams& params);

// `workspace` holds score_cpu_workspace_bytes(params, parallel.num_threads) bytes, 64-byte aligned.
void score_cpu(const ScoreParams& params, void* workspace, const Parallel& parallel = {});

size_t score_cuda_workspace_bytes(const ScoreParams& params, const CudaDevice& device);
CudaStatus score_cuda(const ScoreParams& params, const CudaContext& context);

}  // namespace csp
