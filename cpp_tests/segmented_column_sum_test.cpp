#include "csp/segmented_column_sum.h"

#include "support.h"

namespace csp::test {
namespace {

class SegmentedColumnSum : public PerIsaAndDType {};

struct Sums {
  Buffer self, cross;
};

std::vector<int8_t> random_modality(int64_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int8_t> modality(static_cast<size_t>(size));
  for (auto& id : modality) id = static_cast<int8_t>(static_cast<int>(random() % 4) - 1);
  return modality;
}

SegmentedColumnSumParams shape(DType dtype, int64_t batch, int64_t heads, int64_t window, int64_t keys) {
  SegmentedColumnSumParams params;
  params.dtype = dtype;
  params.batch = batch;
  params.num_heads = heads;
  params.window = window;
  params.keys = keys;
  params.attn_stride = {heads * window * keys, window * keys, keys};
  return params;
}

Sums run(SegmentedColumnSumParams params, const Buffer& attn, const std::vector<int8_t>& queries,
         const std::vector<int8_t>& keys, const Parallel& parallel = {}) {
  const DType type = accumulate_dtype(params.dtype);
  const size_t size = static_cast<size_t>(params.batch * params.num_heads * params.keys);
  Sums sums{Buffer(type, size), Buffer(type, size)};
  for (size_t i = 0; i < size; ++i) {
    sums.self.set(i, NAN);
    sums.cross.set(i, NAN);
  }
  params.attn = attn.data();
  params.query_modality = queries.data();
  params.key_modality = keys.data();
  params.self = sums.self.data();
  params.cross = sums.cross.data();
  segmented_column_sum_cpu(params, parallel);
  return sums;
}

TEST_P(SegmentedColumnSum, MatchesTheFormula) {
  for (const int64_t keys : {1, 15, 16, 33, 1030}) {
    for (const int64_t window : {0, 1, 8, 21}) {
      const SegmentedColumnSumParams p = shape(dtype(), 2, 2, window, keys);
      Buffer attn(dtype(), static_cast<size_t>(p.batch * p.attn_stride.batch));
      for (size_t i = 0; i < attn.size(); ++i) attn.set(i, (i * 37 % 101) / 101.0);
      const auto queries = random_modality(2 * window, 5), modality = random_modality(2 * keys, 6);
      const Sums sums = run(p, attn, queries, modality);
      for (int64_t row = 0; row < 4; ++row) {
        const int64_t b = row / 2;
        for (int64_t j = 0; j < keys; ++j) {
          double self = 0, cross = 0;
          for (int64_t i = 0; i < window; ++i) {
            const int query = queries[b * window + i], key = modality[b * keys + j];
            if (query >= 0 && key >= 0) (query == key ? self : cross) += attn[(row * window + i) * keys + j];
          }
          // The sums are float32 whatever the input: only their own rounding counts.
          const double tolerance = dtype() == DType::kFloat64 ? 1e-13 : 1e-6;
          EXPECT_NEAR(sums.self.read(row * keys + j), self, tolerance * self) << "keys " << keys;
          EXPECT_NEAR(sums.cross.read(row * keys + j), cross, tolerance * cross) << "keys " << keys;
        }
      }
    }
  }
}

TEST_P(SegmentedColumnSum, WhatDoesNotCountMayBeNan) {
  const SegmentedColumnSumParams p = shape(dtype(), 1, 1, 3, 20);
  Buffer attn(dtype(), 60);
  for (size_t i = 0; i < 60; ++i) attn.set(i, i / 20 == 1 || i % 20 == 4 ? NAN : 1.0);
  std::vector<int8_t> queries{0, -1, 1}, keys(20, 0);
  keys[4] = -1;
  const Sums sums = run(p, attn, queries, keys);
  for (size_t j = 0; j < 20; ++j) {
    EXPECT_EQ(sums.self.read(j), j == 4 ? 0.0 : 1.0);
    EXPECT_EQ(sums.cross.read(j), j == 4 ? 0.0 : 1.0);
  }
}

TEST_P(SegmentedColumnSum, StridesAreFollowed) {
  // One row stands for all: batch, head and query strides of zero.
  SegmentedColumnSumParams p = shape(dtype(), 2, 3, 10, 40);
  p.attn_stride = {};
  const Buffer attn = Buffer::random(dtype(), 40, 1);
  const std::vector<int8_t> queries(20, 0), keys(80, 0);
  const Sums sums = run(p, attn, queries, keys);
  for (size_t j = 0; j < 240; ++j) EXPECT_NEAR(sums.self.read(j), 10 * attn[j % 40], 1e-5);
}

TEST_P(SegmentedColumnSum, ThreadsDoNotChangeABit) {
  const SegmentedColumnSumParams p = shape(dtype(), 1, 3, 30, 2500);
  const Buffer attn = Buffer::random(dtype(), 3 * 30 * 2500, 9);
  const auto queries = random_modality(30, 1), keys = random_modality(2500, 2);
  const Sums one = run(p, attn, queries, keys), two = run(p, attn, queries, keys, threads(2));
  EXPECT_EQ(one.self.bytes(), two.self.bytes());
  EXPECT_EQ(one.cross.bytes(), two.cross.bytes());
}

TEST_P(SegmentedColumnSum, EmptyProblems) {
  EXPECT_EQ(segmented_column_sum_cpu_tasks(shape(dtype(), 0, 2, 3, 4)), 0);
  for (const auto& p : {shape(dtype(), 0, 2, 3, 4), shape(dtype(), 1, 0, 3, 4), shape(dtype(), 1, 2, 3, 0)}) {
    run(p, Buffer(dtype(), 0), {}, {});
  }
}

CSP_INSTANTIATE(SegmentedColumnSum);

}  // namespace
}  // namespace csp::test
