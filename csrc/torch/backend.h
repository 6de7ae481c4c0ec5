#pragma once

#include <initializer_list>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "csp/cuda.h"
#include "csp/parallel.h"

#ifdef CSP_CUDA
#include <cstdlib>
#include <string_view>

#include <torch/csrc/stable/accelerator.h>
#endif

// Each binding file is compiled once per backend; this header holds all that differs between the two:
// CSP_IMPL(op) registers the function `op` for the backend's dispatch key;
// CSP_LAUNCHER(op) and CSP_WORKSPACE(op) are its launcher and the function that sizes the scratch;
// launch(...) calls them; checks_values() says whether values inside tensors are looked at.

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

// A tensor of a call and its name: what an error says about the problem. The first one's device does the
// work.
struct Argument {
  const char* name;
  const Tensor& tensor;
};
using Arguments = std::initializer_list<Argument>;

inline std::string problem_of(const char* op, Arguments arguments) {
  std::string text;
  for (const auto& [name, tensor] : arguments) {
    text += (text.empty() ? "" : ", ") + std::string(name) + " " + name_of(type_of(op, name, tensor)) + " " +
            shape_of(tensor);
  }
  return text;
}

// Scratch memory of the caller's allocator; freed when the tensor goes out of scope.
inline Tensor workspace(const char* op, Arguments arguments, size_t bytes) {
  try {
    return torch::stable::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, std::nullopt,
                                arguments.begin()->tensor.device());
  } catch (const std::exception&) {
    fail(op, "out of memory: no room for a workspace of ", bytes, " bytes, needed for ",
         problem_of(op, arguments));
  }
}

#ifdef CSP_CUDA

#define CSP_IMPL(op)                        \
  STABLE_TORCH_LIBRARY_IMPL(csp, CUDA, m) { \
    m.impl(#op, TORCH_BOX(&csp::op));       \
  }
#define CSP_LAUNCHER(op) op##_cuda
#define CSP_WORKSPACE(op) op##_cuda_workspace_bytes

// To look means to wait for the stream, so it is asked for: CSP_CHECK=1 in the environment.
inline bool checks_values() {
  static const bool wanted = [] {
    const char* const value = std::getenv("CSP_CHECK");
    return value != nullptr && *value != '\0' && std::string_view(value) != "0";
  }();
  return wanted;
}

// What a launcher needs of a device; refuses one that the kernels do not run on.
inline CudaDevice device_of(const char* op, const Tensor& on) {
  int error = 0;
  const CudaDevice device = cuda_device(on.get_device_index(), &error);
  CSP_CHECK(error == 0, op, name_of(on.device()), " gives no properties: ", cuda_error_string(error));
  CSP_CHECK(device.capability >= kMinCudaCapability, op, name_of(on.device()), " has compute capability ",
            device.capability / 10, ".", device.capability % 10, ", the kernels need 7.5 or later");
  return device;
}

// Launches on the device of the first argument, on torch's current stream there.
template <typename Params>
void launch(const char* op, Arguments arguments, const Params& params,
            CudaStatus (*launcher)(const Params&, const CudaContext&),
            size_t (*workspace_bytes)(const Params&, const CudaDevice&) = nullptr) {
  const Tensor& on = arguments.begin()->tensor;
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  CudaContext context;
  context.device = device_of(op, on);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &context.stream));
  Tensor scratch;
  if (workspace_bytes != nullptr) {
    context.workspace_bytes = workspace_bytes(params, context.device);
    scratch = workspace(op, arguments, context.workspace_bytes);
    context.workspace = scratch.mutable_data_ptr();
  }
  const CudaStatus status = launcher(params, context);
  if (status.ok()) return;
  const char* const reason = status.reason != nullptr ? status.reason : cuda_error_string(status.error);
  if (status.kernel == nullptr) fail(op, reason, " (", problem_of(op, arguments), ")");
  fail(op, "kernel ", status.kernel, " could not be launched for ", problem_of(op, arguments), " on ",
       name_of(on.device()), ": ", reason);
}

#else

#define CSP_IMPL(op)                       \
  STABLE_TORCH_LIBRARY_IMPL(csp, CPU, m) { \
    m.impl(#op, TORCH_BOX(&csp::op));      \
  }
#define CSP_LAUNCHER(op) op##_cpu
#define CSP_WORKSPACE(op) op##_cpu_workspace_bytes

inline bool checks_values() {
  return true;
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

template <typename Params>
void launch(const char*, Arguments, const Params& params, void (*launcher)(const Params&, const Parallel&)) {
  launcher(params, torch_parallel());
}

template <typename Params>
void launch(const char* op, Arguments arguments, const Params& params,
            void (*launcher)(const Params&, void*, const Parallel&),
            size_t (*workspace_bytes)(const Params&, int32_t)) {
  const Parallel parallel = torch_parallel();
  Tensor scratch = workspace(op, arguments, workspace_bytes(params, parallel.num_threads));
  launcher(params, scratch.mutable_data_ptr(), parallel);
}

#endif

// The values of a tensor in host memory, for checks_values().
inline Tensor on_host(const char* op, const char* name, const Tensor& t) {
  if (t.is_cpu()) return t;
  try {
    return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  } catch (const std::exception&) {
    fail(op, "CSP_CHECK=1 could not read ", name, " back (it cannot while a CUDA graph is captured)");
  }
}

}  // namespace csp
