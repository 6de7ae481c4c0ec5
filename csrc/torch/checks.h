#pragma once

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "csp/types.h"

// Checks shared by the bindings. Every message reads `csp::<op>: <argument> must be ..., got <value>`.

namespace csp {

static_assert(TORCH_TARGET_VERSION <= TORCH_ABI_VERSION, "csp_ext targets a newer torch than these headers");

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "csp::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The arguments after the condition are only evaluated on failure.
#define CSP_CHECK(condition, op, ...)               \
  do {                                              \
    if (!(condition)) ::csp::fail(op, __VA_ARGS__); \
  } while (false)

inline std::string shape_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}
inline std::string shape_of(const Tensor& tensor) {
  return shape_of(tensor.sizes());
}

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return "torch scalar type " + std::to_string(static_cast<int>(type));
  }
}

inline std::string name_of(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  const std::string type =
      device.is_cuda() ? "cuda" : "device type " + std::to_string(static_cast<int>(device.type()));
  return type + ":" + std::to_string(device.index());
}

// ---- tensors ----

inline Tensor contiguous(const char* op, const char* name, const Tensor& t) {
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {
    // The C API of torch drops the reason and names one of its headers instead.
    fail(op, "out of memory: no room for a contiguous copy of ", name, " ", shape_of(t));
  }
}

// torch hands None over as an undefined tensor.
inline void check_defined(const char* op, const char* name, const Tensor& t) {
  CSP_CHECK(t.defined(), op, name, " must be a tensor, got None");
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* shape) {
  check_defined(op, name, t);
  CSP_CHECK(t.dim() == rank, op, name, " must be ", rank, "-D ", shape, ", got ", t.dim(), "-D ",
            shape_of(t));
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t size,
                       const char* meaning) {
  CSP_CHECK(t.size(dim) == size, op, name, " must have ", meaning, " = ", size, " in dimension ", dim,
            ", got shape ", shape_of(t));
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
                         const char* like_name) {
  CSP_CHECK(t.device() == like.device(), op, name, " must be on the device of ", like_name, " (",
            name_of(like.device()), "), got ", name_of(t.device()));
}

inline ScalarType type_of(const char* op, const char* name, const Tensor& t) {
  try {
    return t.scalar_type();
  } catch (const std::exception&) {
    fail(op, name, " has a dtype that torch's stable ABI does not know (as float4, float8_e8m0fnu, int4)");
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  const ScalarType type = type_of(op, name, t);
  CSP_CHECK(type == want, op, name, " must be ", name_of(want), ", got ", name_of(type));
}

inline void check_unit_stride(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  CSP_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, name,
            " must have unit stride in its last dimension, got stride ", t.stride(last),
            " (call .contiguous())");
}

// Indices and positions are int32 on every device.
inline void check_int32(const char* op, const char* name, int64_t value) {
  CSP_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), op, name,
            " must be between 0 and 2147483647, got ", value);
}

// A [rows, cols] int8 modality; returned contiguous.
inline Tensor check_modality(const char* op, const char* name, const Tensor& t, const Tensor& like,
                             const char* like_name, int64_t batch, int64_t length, const char* shape) {
  check_rank(op, name, t, 2, shape);
  check_dtype(op, name, t, ScalarType::Char);
  check_device(op, name, t, like, like_name);
  CSP_CHECK(t.size(0) == batch && t.size(1) == length, op, name, " must be ", shape, " = [", batch, ", ",
            length, "], got ", shape_of(t));
  return contiguous(op, name, t);
}

inline DType floating_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = type_of(op, name, t);
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      CSP_CHECK(t.is_cpu(), op, name,
                " is float64, which the CUDA kernels do not take; use csp_ext.reference.", op);
      return DType::kFloat64;
    default:
      fail(op, name, " must be float32, float16, bfloat16 or (CPU) float64, got ", name_of(type));
  }
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat64:
      return ScalarType::Double;
    default:
      return ScalarType::Float;
  }
}

inline Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// ---- numbers ----

inline void check_n(const char* op, double n) {
  CSP_CHECK(n >= 0 && std::isfinite(n), op, "n must be finite and >= 0, got ", n);
}

inline double check_scale(const char* op, std::optional<double> scale, int64_t head_dim) {
  const double value = scale.value_or(head_dim > 0 ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : 1.0);
  CSP_CHECK(std::isfinite(value), op, "scale must be finite, got ", value);
  CSP_CHECK(std::abs(value) <= std::numeric_limits<float>::max(), op, "scale must fit into float32, got ",
            value);
  return value;
}

inline void check_group(const char* op, int64_t num_heads, int64_t num_kv_heads) {
  CSP_CHECK(num_kv_heads > 0 ? num_heads % num_kv_heads == 0 && num_heads > 0 : num_heads == 0, op,
            "query must have a multiple of key's ", num_kv_heads, " heads, got ", num_heads);
}

inline Heads check_heads(const char* op, const std::string& heads) {
  if (heads == "kv") return Heads::kKv;
  if (heads == "shared") return Heads::kShared;
  fail(op, "heads must be \"kv\" or \"shared\", got \"", heads, "\"");
}

inline Combine check_combine(const char* op, const std::string& combine) {
  if (combine == "intersection") return Combine::kIntersection;
  if (combine == "union") return Combine::kUnion;
  if (combine == "calibrated") return Combine::kCalibrated;
  fail(op, "combine must be \"intersection\", \"union\" or \"calibrated\", got \"", combine, "\"");
}

inline Pool check_pool(const char* op, const std::string& pool) {
  if (pool == "none") return Pool::kNone;
  if (pool == "max") return Pool::kMax;
  if (pool == "past") return Pool::kPast;
  if (pool == "avg") return Pool::kAvg;
  fail(op, "pool must be \"none\", \"max\", \"past\" or \"avg\", got \"", pool, "\"");
}

}  // namespace csp
