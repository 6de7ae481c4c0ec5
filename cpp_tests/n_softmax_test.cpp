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

// n e^-shift: 0 * inf for n = 0, and inf for a tiny n.
TEST_P(NSoftmax, LogitsFarBelowZero) {
  Buffer logits(dtype(), 20);
  for (size_t i = 0; i < 20; ++i) logits.set(i, -1024);
  const Buffer plain = run(logits, dtype(), 1, 20, 0.0);
  for (size_t i = 0; i < 20; ++i) EXPECT_NEAR(plain.read(i), 0.05, 0.05 * rounding(dtype()));
  logits.set(0, -92);
  const Buffer tiny = run(logits, dtype(), 1, 20, 1e-40);
  const double want = 1 / (1 + 1e-40 * std::exp(92.0));
  EXPECT_NEAR(tiny.read(0), want, 2e-5 * want + rounding(dtype()) * want);
}

TEST_P(NSoftmax, ANanSpoilsItsRowWhateverItsBits) {
  for (const bool all : {false, true}) {
    Buffer logits = Buffer::random(dtype(), 38, 5);
    for (size_t i = 0; i < 19; i += all ? 1 : 19) {
      // All ones: a NaN with every bit of its payload set.
      std::memset(static_cast<char*>(logits.data()) + i * dtype_bytes(dtype()), 0xff, dtype_bytes(dtype()));
    }
    const Buffer out = run(logits, dtype(), 2, 19, 1.0);
    for (size_t i = 0; i < 38; ++i) EXPECT_EQ(std::isnan(out.read(i)), i < 19) << i;
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
