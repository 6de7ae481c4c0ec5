#pragma once

#include <cstddef>
#include <cstdint>

// What every *_cuda launcher takes and returns. Plain C++: no CUDA header is needed to call one.
namespace csp {

// What the launchers' shapes depend on. The default is an H200.
struct CudaDevice {
  int32_t multiprocessors = 132;
  int32_t capability = 90;        // 10 * major + minor
  int64_t shared_bytes = 232448;  // shared memory that one block may have
  int64_t l2_bytes = 60ll << 20;
};

constexpr int32_t kMinCudaCapability = 75;

// Properties of a device; of the current one for a negative ordinal. Synchronises nothing.
// `status` takes a cudaError_t if the driver gives one.
CudaDevice cuda_device(int32_t ordinal, int* error);

// Where a launcher works: the caller's stream (a cudaStream_t) of the current device, and scratch memory
// on that device, 256-byte aligned, of at least <op>_cuda_workspace_bytes. What it holds does not matter.
struct CudaContext {
  CudaDevice device;
  void* stream = nullptr;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// The outcome of a launcher: `error` is a cudaError_t, `kernel` the one that could not be launched; where the
// launcher itself refused, `kernel` is null and `reason` says why (float64, a workspace that is too small).
struct CudaStatus {
  int error = 0;
  const char* kernel = nullptr;
  const char* reason = nullptr;

  constexpr bool ok() const { return error == 0; }
};

// The driver's words for a cudaError_t.
const char* cuda_error_string(int error);

}  // namespace csp
