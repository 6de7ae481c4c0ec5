#pragma once

#include "csp/parallel.h"
#include "csp/types.h"

namespace csp {

// Copies the rows named by `indices` out of key and value, bit for bit; zeros for an index of -1.
struct CompactParams {
  DType dtype = DType::kFloat32;
  const void* key = nullptr;    // [B, Hkv, L, D], unit stride in D
  const void* value = nullptr;  // [B, Hkv, L, Dv], unit stride in Dv
  Strides key_stride;
  Strides value_stride;
  const int32_t* indices = nullptr;  // [B, Hs, T], contiguous, in [-1, L)
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

void compact_cpu(const CompactParams& params, const Parallel& parallel = {});

}  // namespace csp
