#include "csp/n_softmax.h"

#include "support.h"

namespace csp::test {
namespace {

class NSoftmaxCuda : public PerCudaDType {};

void check(const Buffer& logits, DType dtype, int64_t rows, int64_t cols, double n) {
  SCOPED_TRACE(testing::Message() << rows << " x " << cols << ", n = " << n);
  const Buffer wide = widened(logits);
  Buffer want(DType::kFloat64, wide.size());
  NSoftmaxParams truth{DType::kFloat64, wide.data(), want.data(), rows, cols, n};
  n_softmax_cpu(truth);

  const DeviceBuffer in = to_device("logits", logits), out("out", logits.bytes().size());
  const NSoftmaxParams params{dtype, in.data(), out.data(), rows, cols, n};
  expect_ok(n_softmax_cuda(params, Launch(devices()[0], 0).context()));
  expect_close(out, dtype, want, 2 * rounding(dtype), 1e-7);
}

TEST_P(NSoftmaxCuda, MatchesTheFloat64Kernel) {
  uint32_t seed = 0;
  for (const double n : {0.0, 1.0, 1e6}) {
    for (const int64_t cols : {1, 31, 257, 1000}) {
      seed_threads(++seed);
      check(Buffer::random(GetParam(), static_cast<size_t>(3 * cols), seed, 4.0), GetParam(), 3, cols, n);
    }
  }
}

TEST_P(NSoftmaxCuda, HugeAndMaskedLogits) {
  Buffer logits(GetParam(), 3 * 40);
  for (size_t i = 0; i < 40; ++i) {
    logits.set(i, i == 7 ? 60000 : -60000);
    logits.set(40 + i, -INFINITY);
    logits.set(80 + i, i == 3 ? NAN : 1);
  }
  for (const double n : {0.0, 1.0}) check(logits, GetParam(), 3, 40, n);
}

TEST(NSoftmaxCudaLauncher, TheEmptyProblemLaunchesNothing) {
  const NSoftmaxParams params{DType::kFloat32, nullptr, nullptr, 0, 5, 1.0};
  expect_ok(n_softmax_cuda(params, Launch(devices()[0], 0).context()));
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
