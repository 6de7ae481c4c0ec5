#pragma once

#include <cstdint>

#include "csp/cuda.h"
#include "csp/types.h"

// What the host code of a launcher needs, without a CUDA header.

namespace csp {

// cudaError_t values that launchers return themselves.
constexpr int kCudaInvalidValue = 1;
constexpr int kCudaNotSupported = 801;

constexpr CudaStatus kFloat64Refused{kCudaNotSupported, nullptr, "float64 is not supported on CUDA"};

// The first thing that a launcher with a workspace does.
constexpr CudaStatus check_workspace(const CudaContext& context, size_t needed) {
  if (context.workspace_bytes >= needed) return {};
  return {kCudaInvalidValue, nullptr, "the workspace is smaller than <op>_cuda_workspace_bytes"};
}

// Blocks are one-dimensional. `cluster` blocks in x form a thread block cluster (sm_90 and later).
struct LaunchShape {
  int64_t x = 1;  // < 2^31
  int64_t y = 1;  // < 2^16
  int64_t z = 1;  // < 2^16
  int32_t threads = 256;
  int64_t shared_bytes = 0;
  int32_t cluster = 1;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// The most bytes, of 1, 2, 4, 8 and 16, that one access may move where all of these (addresses, strides and
// lengths in bytes) are multiples of it.
template <typename... Integers>
constexpr int vector_bytes(Integers... multiples) {
  const uint64_t bits = (static_cast<uint64_t>(multiples) | ... | 16u);
  return static_cast<int>(bits & (~bits + 1));
}

// Whether every row of a [batch, heads, rows, ..] tensor begins on a multiple of `elements`, where the first
// does: the stride of a single one is never taken.
constexpr bool rows_on_vectors(const Strides& stride, int64_t batch, int64_t heads, int64_t rows,
                               int64_t elements) {
  return (batch <= 1 || stride.batch % elements == 0) && (heads <= 1 || stride.head % elements == 0) &&
         (rows <= 1 || stride.row % elements == 0);
}

inline uint64_t address_of(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

}  // namespace csp
