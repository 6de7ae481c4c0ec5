#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csp/cuda.h"

// Device memory and a context for the kernel tests. The same tests are linked twice: with device_simt.cpp the
// kernels run in the harness, with device_cuda.cpp on the GPU.
namespace csp::test {

// True in the harness: small problems only, every access checked, any device can be played.
bool in_harness();

// The order of threads from here on (the harness; nothing on a GPU).
void seed_threads(uint64_t seed);

// Kernels launched so far (the harness; on a GPU nobody counts).
uint32_t launches();

class DeviceBuffer {
 public:
  // A copy of `bytes` bytes that begins `offset` bytes past a 256-byte boundary.
  DeviceBuffer(std::string name, const void* contents, size_t bytes, size_t offset = 0);
  // Memory that nobody has written.
  DeviceBuffer(std::string name, size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&&) noexcept;

  void* data() const;
  size_t bytes() const { return bytes_; }

  // What it holds once all launches are done.
  std::vector<std::byte> bytes_now() const;
  template <typename T>
  std::vector<T> values() const {
    const std::vector<std::byte> raw = bytes_now();
    std::vector<T> out(raw.size() / sizeof(T));
    std::copy(raw.begin(), raw.end(), reinterpret_cast<std::byte*>(out.data()));
    return out;
  }

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
  size_t bytes_, offset_ = 0;
};

// The devices to play: one without tensor cores, one with, and one with clusters; on a GPU, that GPU.
std::vector<CudaDevice> devices();

// A context of `device` over a workspace of exactly `workspace_bytes`.
class Launch {
 public:
  Launch(const CudaDevice& device, size_t workspace_bytes);
  const CudaContext& context() const { return context_; }

 private:
  DeviceBuffer workspace_;
  CudaContext context_;
};

}  // namespace csp::test
