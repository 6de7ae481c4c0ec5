#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "csp/parallel.h"
#include "csp/types.h"
#include "isa.h"

// What the op tests share: random numbers in every dtype, a real thread pool, a walk through instruction
// sets.
namespace csp::test {

// A buffer of `dtype` that remembers, in double, the values it really holds after rounding.
class Buffer {
 public:
  Buffer(DType dtype, size_t size) : dtype_(dtype), bytes_(size * dtype_bytes(dtype)), values_(size) {}

  static Buffer random(DType dtype, size_t size, uint32_t seed, double spread = 1.0) {
    Buffer buffer(dtype, size);
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0.0, spread);
    for (size_t i = 0; i < size; ++i) buffer.set(i, normal(generator));
    return buffer;
  }

  void set(size_t i, double value) {
    switch (dtype_) {
      case DType::kFloat64:
        write(i, value);
        break;
      case DType::kFloat32:
        write(i, static_cast<float>(value));
        break;
      case DType::kBFloat16: {
        const auto bits = __builtin_bit_cast(uint32_t, static_cast<float>(value));
        write(i, static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16));
        break;
      }
      case DType::kFloat16:
        write(i, static_cast<_Float16>(value));
        break;
    }
    values_[i] = read(i);
  }

  // The element as it stands in memory now.
  double read(size_t i) const {
    switch (dtype_) {
      case DType::kFloat64:
        return at<double>(i);
      case DType::kFloat32:
        return at<float>(i);
      case DType::kBFloat16:
        return __builtin_bit_cast(float, uint32_t{at<uint16_t>(i)} << 16);
      case DType::kFloat16:
        return static_cast<double>(at<_Float16>(i));
    }
    return 0;
  }

  double operator[](size_t i) const { return values_[i]; }
  size_t size() const { return values_.size(); }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  template <typename T>
  T at(size_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void write(size_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
  }

  DType dtype_;
  std::vector<unsigned char> bytes_;
  std::vector<double> values_;
};

// Largest error of one rounding to dtype, relative to the value.
inline double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-13;
    case DType::kFloat32:
      return 1e-5;
    case DType::kFloat16:
      return 1e-3;
    case DType::kBFloat16:
      return 8e-3;
  }
  return 0;
}

// A pool of real threads, so that tasks do run at the same time.
inline Parallel threads(int32_t count) {
  Parallel parallel;
  parallel.num_threads = count;
  parallel.run = [](int32_t workers, void (*body)(void*, int32_t), void* context) {
    std::vector<std::thread> pool;
    for (int32_t worker = 0; worker < workers; ++worker) pool.emplace_back(body, context, worker);
    for (auto& thread : pool) thread.join();
  };
  return parallel;
}

// 64-byte aligned scratch of exactly the size asked for, so that AddressSanitizer sees an overrun.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : data_(nullptr) {
    if (bytes > 0 && posix_memalign(&data_, 64, bytes) != 0) std::abort();
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "";
}

// A fixture run once per instruction set that this machine has, and per dtype.
class PerIsaAndDType : public ::testing::TestWithParam<std::tuple<const char*, DType>> {
 protected:
  void SetUp() override {
    setenv("CSP_CPU_CAPABILITY", std::get<0>(GetParam()), 1);
    reset_cpu_isa();
    if (std::string(cpu_isa_name()) != std::get<0>(GetParam()))
      GTEST_SKIP() << "this CPU has no " << std::get<0>(GetParam());
  }
  void TearDown() override {
    unsetenv("CSP_CPU_CAPABILITY");
    reset_cpu_isa();
  }
  static DType dtype() { return std::get<1>(GetParam()); }
};

#define CSP_INSTANTIATE(fixture)                                                                           \
  INSTANTIATE_TEST_SUITE_P(                                                                                \
      , fixture,                                                                                           \
      ::testing::Combine(::testing::Values("baseline", "avx2", "avx512"),                                  \
                         ::testing::Values(::csp::DType::kFloat32, ::csp::DType::kFloat16,                 \
                                           ::csp::DType::kBFloat16, ::csp::DType::kFloat64)),              \
      [](const auto& info) {                                                                               \
        return std::string(std::get<0>(info.param)) + "_" + ::csp::test::name_of(std::get<1>(info.param)); \
      })

}  // namespace csp::test
