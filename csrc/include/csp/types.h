#pragma once

#include <cstddef>
#include <cstdint>

// Element types, layouts and rules shared by the params structs of every op.
namespace csp {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

constexpr int64_t dtype_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The type of scores and log-sum-exps: float64 for float64 inputs, otherwise float32.
constexpr DType accumulate_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

enum class Heads : int32_t { kKv, kShared };
enum class Combine : int32_t { kIntersection, kUnion, kCalibrated };
enum class Pool : int32_t { kNone, kMax, kAvg, kPast };

// Strides in elements of a 4-D [batch, head, row, head_dim] tensor whose last stride is 1.
struct Strides {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
};

}  // namespace csp
