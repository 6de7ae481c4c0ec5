#pragma once

#include "csp/decode.h"
#include "launch.h"

namespace csp {

// How decode cuts a problem on a GPU. By the shape alone, never by pointers or strides: a problem that the
// tensor cores cannot take because it is not aligned runs on the same splits.
struct DecodeCudaPlan {
  int64_t rows = 0;           // query rows that share a KV head: row g Q + i is query i of its g-th head
  bool tensor_cores = false;  // where alignment allows
  int64_t splits = 1;         // blocks that share the slots of one row
  bool clustered = false;     // the splits of a row are one cluster and merge themselves
  int64_t workspace_bytes = 0;
  int64_t launches = 0;
};

DecodeCudaPlan decode_cuda_plan(const DecodeParams& params, const CudaDevice& device);

// Query rows of a block of decode_mma, and the longest head it takes.
constexpr int64_t kDecodeMmaRows = 16;
constexpr int64_t kDecodeMmaHeadDim = 256;

// Columns of a head that one lane of decode_fma holds, and the query rows of a block: what fits the
// registers.
constexpr int64_t decode_fma_columns(int64_t head_dim) {
  return head_dim <= 128 ? 4 : head_dim <= 256 ? 8 : 16;
}
constexpr int64_t decode_fma_rows(int64_t columns) {
  return columns <= 8 ? 4 : 2;
}

// One per dtype, so that they compile side by side; the problem is not empty.
template <DType kDType>
CudaStatus launch_decode(const DecodeParams& params, const DecodeCudaPlan& plan, const CudaContext& context);

}  // namespace csp
