#include "csp/n_softmax.h"

#include <limits>

#include "csp/plan.h"
#include "support.h"

namespace csp::test {
namespace {

class NSoftmaxCuda : public PerCudaDType {};

struct Offsets {
  int64_t in = 0;  // elements past a 256-byte boundary
  int64_t out = 0;
};

DeviceBuffer run(const Buffer& logits, DType dtype, int64_t rows, int64_t cols, double n, Offsets at = {}) {
  const auto bytes = [&](int64_t elements) { return static_cast<size_t>(elements * dtype_bytes(dtype)); };
  const DeviceBuffer in = to_device("logits", logits, bytes(at.in));
  DeviceBuffer out = at.out == 0 ? DeviceBuffer("out", logits.bytes().size())
                                 : to_device("out", Buffer(dtype, logits.size()), bytes(at.out));
  const NSoftmaxParams params{dtype, in.data(), out.data(), rows, cols, n};
  const CudaDevice device = devices()[0];
  const uint32_t before = launches();
  expect_ok(n_softmax_cuda(params, Launch(device, 0).context()));
  if (in_harness()) {
    EXPECT_EQ(launches() - before, plan_n_softmax_cuda(params, device).launches);
  }
  return out;
}

// One rounding to dtype beside the error of float32 arithmetic, and half its smallest number.
double relative_error(DType dtype) {
  return 1e-5 + (dtype == DType::kFloat16 ? 0x1p-11 : dtype == DType::kBFloat16 ? 0x1p-8 : 0);
}
double absolute_error(DType dtype) {
  return dtype == DType::kFloat16 ? 0x1p-25 : 0x1p-126;
}

void check(const Buffer& logits, DType dtype, int64_t rows, int64_t cols, double n, Offsets at = {}) {
  SCOPED_TRACE(testing::Message() << rows << " x " << cols << ", n = " << n << ", at " << at.in << " and "
                                  << at.out);
  const Buffer wide = widened(logits);
  Buffer want(DType::kFloat64, wide.size());
  n_softmax_cpu({DType::kFloat64, wide.data(), want.data(), rows, cols, n});
  expect_close(run(logits, dtype, rows, cols, n, at), dtype, want, relative_error(dtype),
               absolute_error(dtype));
}

void check_random(DType dtype, int64_t rows, int64_t cols, double n, Offsets at = {}) {
  static uint32_t seed = 0;
  seed_threads(++seed);
  check(Buffer::random(dtype, static_cast<size_t>(rows * cols), seed, 4.0), dtype, rows, cols, n, at);
}

TEST_P(NSoftmaxCuda, ShortRows) {
  for (const double n : {0.0, 1.0, 1e6}) {
    for (const int64_t cols : {1, 2, 7, 8, 31, 64, 100, 255}) check_random(GetParam(), 19, cols, n);
  }
}

// On both sides of every length at which more registers, more threads or a second reading are needed; odd
// lengths begin each row at another place.
TEST_P(NSoftmaxCuda, RowsOfEveryLength) {
  for (const int64_t limit : {256, 1024, 4096, 8192, 16384}) {
    for (const int64_t cols : {limit - 3, limit, limit + 1}) check_random(GetParam(), 2, cols, 1.0);
  }
  check_random(GetParam(), 2, 40001, 0.0);
}

TEST_P(NSoftmaxCuda, MisalignedRows) {
  for (const int64_t in : {0, 1, 2, 3, 5, 8}) {
    for (const int64_t out : {0, 1, 5}) {
      for (const int64_t cols : {3, 65, 700, 1100}) check_random(GetParam(), 3, cols, 1.0, {in, out});
    }
  }
  check_random(GetParam(), 1, 17000, 1.0, {3, 3});
  check_random(GetParam(), 1, 17000, 1.0, {3, 0});
}

TEST_P(NSoftmaxCuda, EveryConstant) {
  for (const double n : {1e-30, 1e-3, 3.0, 1e12, 1e30, 1e300}) {
    check_random(GetParam(), 2, 50, n);
    check_random(GetParam(), 1, 1500, n);
  }
  // log n is near the logits, and no float: rounded, it would be off by 2e-5.
  Buffer logits(GetParam(), 10);
  for (size_t i = 0; i < 10; ++i) logits.set(i, 690 + 0.5 * static_cast<double>(i % 3));
  check(logits, GetParam(), 1, 10, 1e302);
}

TEST_P(NSoftmaxCuda, HugeAndMaskedLogits) {
  for (const int64_t cols : {40, 1500, 17000}) {
    const auto size = static_cast<size_t>(cols);
    Buffer logits(GetParam(), 4 * size);
    for (size_t i = 0; i < size; ++i) {
      logits.set(i, i == 7 ? 60000 : -60000);
      logits.set(size + i, -INFINITY);
      logits.set(2 * size + i, i % 3 == 0 ? 1 : -INFINITY);
      logits.set(3 * size + i, -60000.0 + (GetParam() == DType::kFloat32 ? 0.25 : 32.0) * (i % 20));
    }
    for (const double n : {0.0, 1.0}) check(logits, GetParam(), 4, cols, n);
  }
}

// The difference to the largest logit is exact, however large both are.
TEST_P(NSoftmaxCuda, HugeLogitsKeepTheirDifferences) {
  for (const int64_t cols : {40, 1500, 17000}) {
    Buffer logits(GetParam(), static_cast<size_t>(cols));
    for (size_t i = 0; i < logits.size(); ++i) logits.set(i, 50000 + 0.125 * static_cast<double>(i % 64));
    check(logits, GetParam(), 1, cols, 1.0);
  }
}

TEST_P(NSoftmaxCuda, NanAndInfinitySpreadOverTheirRow) {
  for (const int64_t cols : {1, 29, 1501, 16399}) {
    for (const double odd : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
      for (const int64_t at : {int64_t{0}, cols / 2, cols - 1}) {
        Buffer logits = Buffer::random(GetParam(), static_cast<size_t>(3 * cols), 5);
        logits.set(static_cast<size_t>(cols + at), odd);
        check(logits, GetParam(), 3, cols, 1.0);
      }
    }
  }
  Buffer logits(GetParam(), 60);
  for (size_t i = 0; i < 60; ++i) logits.set(i, i < 30 ? NAN : i == 40 ? NAN : -INFINITY);
  for (const double n : {0.0, 1.0}) check(logits, GetParam(), 2, 30, n);
}

// More of them than blocks are launched for.
TEST_P(NSoftmaxCuda, ManyRowsThatAreReadTwice) {
  check_random(GetParam(), 16 * devices()[0].multiprocessors + 3, 3, 1.0, {1, 0});
}

TEST_P(NSoftmaxCuda, TheOrderOfThreadsDoesNotChangeABit) {
  for (const int64_t cols : {100, 1000, 3001, 8000, 16001, 20001}) {
    const Buffer logits = Buffer::random(GetParam(), static_cast<size_t>(2 * cols), 3, 4.0);
    const std::vector<std::byte> first = run(logits, GetParam(), 2, cols, 1.0).bytes_now();
    for (uint64_t seed = 10; seed < 13; ++seed) {
      seed_threads(seed);
      EXPECT_EQ(run(logits, GetParam(), 2, cols, 1.0).bytes_now(), first) << cols;
    }
  }
}

TEST_P(NSoftmaxCuda, EmptyProblemsLaunchNothing) {
  run(Buffer(GetParam(), 0), GetParam(), 0, 5, 1.0);
  run(Buffer(GetParam(), 0), GetParam(), 5, 0, 1.0);
}

TEST(NSoftmaxCudaLauncher, RefusesFloat64) {
  const NSoftmaxParams params{DType::kFloat64, nullptr, nullptr, 1, 5, 1.0};
  const CudaStatus status = n_softmax_cuda(params, Launch(devices()[0], 0).context());
  EXPECT_FALSE(status.ok());
  EXPECT_STREQ(status.reason, "float64 is not supported on CUDA");
}

CSP_INSTANTIATE_CUDA(NSoftmaxCuda);

}  // namespace
}  // namespace csp::test
