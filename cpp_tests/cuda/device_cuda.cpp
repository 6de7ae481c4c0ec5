#include <stdexcept>
#include <utility>

#include <cuda_runtime.h>

#include "device.h"

namespace csp::test {

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

struct DeviceBuffer::Memory {
  explicit Memory(size_t bytes) {
    check(cudaMalloc(&data, bytes > 0 ? bytes : 1));
    check(cudaMemset(data, 0xff, bytes));
  }
  ~Memory() { cudaFree(data); }
  void* data = nullptr;
};

bool in_harness() {
  return false;
}
void seed_threads(uint64_t) {}
uint32_t launches() {
  return 0;
}

DeviceBuffer::DeviceBuffer(std::string, const void* contents, size_t bytes, size_t offset)
    : memory_(new Memory(offset + bytes)), bytes_(bytes), offset_(offset) {
  check(cudaMemcpy(data(), contents, bytes, cudaMemcpyHostToDevice));
}
DeviceBuffer::DeviceBuffer(std::string, size_t bytes) : memory_(new Memory(bytes)), bytes_(bytes) {}
DeviceBuffer::~DeviceBuffer() = default;
DeviceBuffer::DeviceBuffer(DeviceBuffer&&) noexcept = default;

void* DeviceBuffer::data() const {
  return static_cast<std::byte*>(memory_->data) + offset_;
}
std::vector<std::byte> DeviceBuffer::bytes_now() const {
  check(cudaDeviceSynchronize());
  std::vector<std::byte> host(bytes_);
  check(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost));
  return host;
}

std::vector<CudaDevice> devices() {
  int error = 0;
  const CudaDevice device = cuda_device(-1, &error);
  check(static_cast<cudaError_t>(error));
  return {device};
}

Launch::Launch(const CudaDevice& device, size_t workspace_bytes) : workspace_("workspace", workspace_bytes) {
  context_.device = device;
  context_.workspace = workspace_.data();
  context_.workspace_bytes = workspace_bytes;
}

}  // namespace csp::test
