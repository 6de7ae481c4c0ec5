#include "csp/n_softmax.h"

#include "support.h"

namespace csp::test {
namespace {

class NSoftmax : public PerIsaAndDType {};

Buffer run(const Buffer& logits, DType dtype, int64_t rows, int64_t cols, double n,
           const Parallel& parallel = {}) {
  Buffer out(dtype, logits.size());
  NSoftmaxParams params;
  params.dtype = dtype;
  params.logits = logits.data();
  params.out = out.data();
  params.rows = rows;
  params.cols = cols;
  params.n = n;
  n_softmax_cpu(params, parallel);
  return out;
}

TEST_P(NSoftmax, MatchesTheFormula) {
  for (const double n : {0.0, 1.0, 2.5}) {
    for (const int64_t cols : {1, 3, 16, 17, 100}) {
      const int64_t rows = 5;
      const Buffer logits = Buffer::random(dtype(), rows * cols, 7 + cols, 3.0);
      const Buffer out = run(logits, dtype(), rows, cols, n);
      for (int64_t row = 0; row < rows; ++row) {
        double sum = n;
        for (int64_t j = 0; j < cols; ++j) sum += std::exp(logits[row * cols + j]);
        for (int64_t j = 0; j < cols; ++j) {
          const double want = std::exp(logits[row * cols + j]) / sum;
          EXPECT_NEAR(out.read(row * cols + j), want, rounding(dtype()) * want + 1e-7)
              << "cols " << cols << " n " << n;
        }
      }
    }
  }
}

TEST_P(NSoftmax, HugeLogitsNeitherOverflowNorVanish) {
  Buffer logits(dtype(), 2);
  logits.set(0, 60000);
  logits.set(1, -60000);
  const Buffer out = run(logits, dtype(), 1, 2, 1.0);
  EXPECT_EQ(out.read(0), 1.0);
  EXPECT_EQ(out.read(1), 0.0);
}

TEST_P(NSoftmax, AFullyMaskedRowIsZero) {
  for (const double n : {0.0, 1.0}) {
    Buffer logits(dtype(), 19);
    for (size_t i = 0; i < 19; ++i) logits.set(i, -INFINITY);
    const Buffer out = run(logits, dtype(), 1, 19, n);
    for (size_t i = 0; i < 19; ++i) EXPECT_EQ(out.read(i), 0.0);
  }
}

TEST_P(NSoftmax, ThreadsDoNotChangeABit) {
  const Buffer logits = Buffer::random(dtype(), 300 * 333, 3, 2.0);
  const Buffer one = run(logits, dtype(), 300, 333, 1.0);
  const Buffer two = run(logits, dtype(), 300, 333, 1.0, threads(2));
  EXPECT_EQ(one.bytes(), two.bytes());
}

CSP_INSTANTIATE(NSoftmax);

}  // namespace
}  // namespace csp::test
