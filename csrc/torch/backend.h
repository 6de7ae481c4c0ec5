#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "csp/cuda.h"
#include "csp/parallel.h"

#ifdef CSP_CUDA
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

// Launches on the device of a tensor, on torch's current stream there, with scratch of torch's allocator.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& on) : op_(op), on_(on), guard_(on.get_device_index()) {
    int error = 0;
    context_.device = cuda_device(static_cast<int32_t>(on.get_device_index()), &error);
    check({error, nullptr, nullptr});
    CSP_CHECK(context_.device.capability >= kMinCudaCapability, op, name_of(on.device()),
              " has compute capability ", context_.device.capability / 10, ".",
              context_.device.capability % 10, ", the kernels need 7.5 or later");
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(on.get_device_index(), &context_.stream));
  }

  const CudaDevice& device() const { return context_.device; }

  // launcher(params, context) with `bytes` of scratch.
  template <typename Params>
  void run(CudaStatus (*launcher)(const Params&, const CudaContext&), const Params& params,
           size_t bytes = 0) {
    Tensor scratch;
    if (bytes > 0) {
      scratch = workspace(op_, on_, bytes);
      context_.workspace = scratch.mutable_data_ptr();
      context_.workspace_bytes = bytes;
    }
    check(launcher(params, context_));
  }

 private:
  void check(const CudaStatus& status) const {
    if (status.ok()) return;
    const char* const reason = status.reason != nullptr ? status.reason : cuda_error_string(status.error);
    if (status.kernel == nullptr) fail(op_, reason);
    fail(op_, "kernel ", status.kernel, " could not be launched on ", shape_of(on_), ": ", reason);
  }

  const char* op_;
  const Tensor& on_;
  torch::stable::accelerator::DeviceGuard guard_;
  CudaContext context_;
};

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
