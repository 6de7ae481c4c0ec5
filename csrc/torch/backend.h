#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "csp/parallel.h"

#ifdef CSP_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// Each binding file is compiled once per backend; this header holds all that differs between the two.
// CSP_IMPL(op) registers the function `op` for the backend's dispatch key.

namespace csp {

inline Tensor empty(const char* op, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    ScalarType type) {
  try {
    return torch::stable::empty(sizes, type, std::nullopt, like.device());
  } catch (const std::exception&) {
    // The C API of torch drops the reason and names one of its headers instead.
    fail(op, "out of memory: no room for a new ", name_of(type), " tensor ", shape_of(sizes));
  }
}

inline Tensor empty(const char* op, const Tensor& like, std::initializer_list<int64_t> sizes,
                    ScalarType type) {
  return empty(op, like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

// Scratch memory of the caller's allocator; freed when the tensor goes out of scope.
inline Tensor workspace(const char* op, const Tensor& like, size_t bytes) {
  return empty(op, like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

#ifdef CSP_CUDA

#define CSP_IMPL(op)                        \
  STABLE_TORCH_LIBRARY_IMPL(csp, CUDA, m) { \
    m.impl(#op, TORCH_BOX(&csp::op));       \
  }

inline void check_launch(const char* op, int error) {
  CSP_CHECK(error == cudaSuccess, op, "launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

#else

#define CSP_IMPL(op)                       \
  STABLE_TORCH_LIBRARY_IMPL(csp, CPU, m) { \
    m.impl(#op, TORCH_BOX(&csp::op));      \
  }

// torch's own intra-op pool.
inline Parallel torch_parallel() {
  Parallel parallel;
  parallel.num_threads = static_cast<int32_t>(torch::stable::get_num_threads());
  parallel.run = [](int32_t workers, void (*body)(void*, int32_t), void* context) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(context, static_cast<int32_t>(worker));
    });
  };
  return parallel;
}

#endif

}  // namespace csp
