#include <cstring>
#include <utility>

#include "device.h"
#include "simt/engine.h"

namespace csp {

// csrc/cuda/device.cpp asks the driver; here there is none.
CudaDevice cuda_device(int32_t, int* error) {
  *error = 0;
  return {};
}
const char* cuda_error_string(int error) {
  return error == 0 ? "no error" : "an error";
}

namespace test {

struct DeviceBuffer::Memory {
  simt::DeviceMemory device;
};

bool in_harness() {
  return true;
}
void seed_threads(uint64_t seed) {
  simt::seed(seed);
}
uint32_t launches() {
  return simt::launches();
}

DeviceBuffer::DeviceBuffer(std::string name, const void* contents, size_t bytes, size_t offset)
    : bytes_(bytes), offset_(offset) {
  std::vector<std::byte> padded(offset + bytes);
  if (bytes > 0) std::memcpy(padded.data() + offset, contents, bytes);
  memory_.reset(new Memory{{std::move(name), padded.data(), padded.size()}});
}
DeviceBuffer::DeviceBuffer(std::string name, size_t bytes)
    : memory_(new Memory{{std::move(name), nullptr, bytes}}), bytes_(bytes) {}
DeviceBuffer::~DeviceBuffer() = default;
DeviceBuffer::DeviceBuffer(DeviceBuffer&&) noexcept = default;

void* DeviceBuffer::data() const {
  return static_cast<std::byte*>(memory_->device.data()) + offset_;
}
std::vector<std::byte> DeviceBuffer::bytes_now() const {
  const auto* const begin = static_cast<const std::byte*>(data());
  return {begin, begin + bytes_};
}

std::vector<CudaDevice> devices() {
  // Few multiprocessors, so that small problems are cut in many ways.
  return {{4, 75, 64 << 10, 4 << 20}, {6, 80, 164 << 10, 40 << 20}, {8, 90, 227 << 10, 50 << 20}};
}

Launch::Launch(const CudaDevice& device, size_t workspace_bytes) : workspace_("workspace", workspace_bytes) {
  context_.device = device;
  context_.workspace = workspace_.data();
  context_.workspace_bytes = workspace_bytes;
}

}  // namespace test
}  // namespace csp
