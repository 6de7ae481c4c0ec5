#pragma once

#include "csp/cuda.h"
#include "csp/parallel.h"
#include "csp/types.h"

namespace csp {

// Copies the rows named by `indices` out of key and value, bit for bit; zeros for an index of -1.
// Elements are opaque bytes, so every dtype will do.
struct CompactParams {
  int64_t element_bytes = 4;    // of key and value
  const void* key = nullptr;    // [B, Hkv, L, D], unit stride in D
  const void* value = nullptr;  // [B, Hkv, L, Dv], unit stride in Dv
  Strides key_stride;
  Strides value_stride;
  const int32_t* indices = nullptr;  // [B, Hs, T], contiguous, in [-1, L); anything else acts as -1
  void* key_out = nullptr;           // [B, Hkv, T, D], contiguous
  void* value_out = nullptr;         // [B, Hkv, T, Dv], contiguous
  int64_t batch = 0;
  int64_t num_kv_heads = 0;
  int64_t score_heads = 0;  // Hs: num_kv_heads, or 1 for every head
  int64_t keys = 0;         // L
  int64_t budget = 0;       // T
  int64_t head_dim = 0;     // D
  int64_t value_dim = 0;    // Dv
};

// The flat place in `indices` of the first one outside [-1, L), or -1: for callers that rather refuse.
int64_t compact_cpu_bad_index(const CompactParams& params);

// Independent pieces that compact_cpu cuts the problem into, whatever the number of threads.
int64_t compact_cpu_tasks(const CompactParams& params);

void compact_cpu(const CompactParams& params, const Parallel& parallel = {});

// Needs no workspace.
CudaStatus compact_cuda(const CompactParams& params, const CudaContext& context);

}  // namespace csp
