#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "../support.h"
#include "device.h"

// What the kernel tests share. The truth of each is the CPU kernel in float64, over the same rounded inputs;
// that kernel is held against the float64 twins by the Python tests.
namespace csp::test {

inline DeviceBuffer to_device(const std::string& name, const Buffer& buffer, size_t offset = 0) {
  return {name, buffer.data(), buffer.bytes().size(), offset};
}
template <typename T>
DeviceBuffer to_device(const std::string& name, const std::vector<T>& values, size_t offset = 0) {
  return {name, values.data(), values.size() * sizeof(T), offset};
}

// The same numbers in float64.
inline Buffer widened(const Buffer& buffer) {
  Buffer wide(DType::kFloat64, buffer.size());
  for (size_t i = 0; i < buffer.size(); ++i) wide.set(i, buffer[i]);
  return wide;
}

// The numbers of `dtype` on the device.
inline Buffer from_device(const DeviceBuffer& device, DType dtype) {
  const std::vector<std::byte> raw = device.bytes_now();
  Buffer buffer(dtype, raw.size() / static_cast<size_t>(dtype_bytes(dtype)));
  std::memcpy(buffer.data(), raw.data(), raw.size());
  return buffer;
}

// |got - want| <= relative * |want| + absolute, element by element; a NaN only where one is wanted.
inline void expect_close(const Buffer& got, const Buffer& want, double relative, double absolute) {
  ASSERT_EQ(got.size(), want.size());
  int shown = 0;
  for (size_t i = 0; i < got.size() && shown < 5; ++i) {
    const double x = got.read(i), y = want.read(i);
    if (std::isnan(x) && std::isnan(y)) continue;
    if (x == y || std::abs(x - y) <= relative * std::abs(y) + absolute) continue;
    ADD_FAILURE() << "element " << i << " is " << x << ", not " << y;
    ++shown;
  }
}

inline void expect_close(const DeviceBuffer& device, DType dtype, const Buffer& want, double relative,
                         double absolute) {
  expect_close(from_device(device, dtype), want, relative, absolute);
}

inline void expect_ok(const CudaStatus& status) {
  ASSERT_TRUE(status.ok()) << (status.kernel != nullptr ? status.kernel : "the launcher") << ": "
                           << (status.reason != nullptr ? status.reason : cuda_error_string(status.error));
}

// A fixture run once per dtype that the kernels take.
class PerCudaDType : public ::testing::TestWithParam<DType> {};

#define CSP_INSTANTIATE_CUDA(fixture)                                                                        \
  INSTANTIATE_TEST_SUITE_P(                                                                                  \
      , fixture, ::testing::Values(::csp::DType::kFloat32, ::csp::DType::kFloat16, ::csp::DType::kBFloat16), \
      [](const auto& info) { return std::string(::csp::test::name_of(info.param)); })

}  // namespace csp::test
