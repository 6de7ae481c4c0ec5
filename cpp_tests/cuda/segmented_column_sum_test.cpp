#include "csp/segmented_column_sum.h"

#include <random>

#include "csp/plan.h"
#include "support.h"

namespace csp::test {
namespace {

class SegmentedColumnSumCuda : public PerCudaDType {};

std::vector<int8_t> random_modality(int64_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int8_t> modality(static_cast<size_t>(size));
  for (auto& id : modality) id = static_cast<int8_t>(static_cast<int>(random() % 4) - 1);
  return modality;
}

struct Shape {
  int64_t batch = 1;
  int64_t num_heads = 1;
  int64_t window = 1;
  int64_t keys = 1;
  int64_t gap = 0;     // elements between two rows of attn
  int64_t offset = 0;  // elements from a 256-byte boundary to attn
};

struct Problem {
  SegmentedColumnSumParams params;
  int64_t offset;
  Buffer attn;
  std::vector<int8_t> queries, keys;

  Problem(DType dtype, const Shape& s, uint32_t seed)
      : offset(s.offset),
        attn(dtype, static_cast<size_t>(s.batch * s.num_heads * s.window * (s.keys + s.gap))),
        queries(random_modality(s.batch * s.window, seed)),
        keys(random_modality(s.batch * s.keys, seed + 1)) {
    params.dtype = dtype;
    params.batch = s.batch;
    params.num_heads = s.num_heads;
    params.window = s.window;
    params.keys = s.keys;
    const int64_t row = s.keys + s.gap;
    params.attn_stride = {s.num_heads * s.window * row, s.window * row, row};
    std::mt19937 random(seed + 2);
    for (size_t i = 0; i < attn.size(); ++i) attn.set(i, static_cast<double>(random() % 1000) / 1000);
  }

  size_t columns() const { return static_cast<size_t>(params.batch * params.num_heads * params.keys); }
};

struct Sums {
  DeviceBuffer self, cross;
};

Sums run(const Problem& problem, const CudaDevice& device) {
  SegmentedColumnSumParams p = problem.params;
  const DeviceBuffer attn =
      to_device("attn", problem.attn, static_cast<size_t>(problem.offset * dtype_bytes(p.dtype)));
  const DeviceBuffer queries = to_device("query_modality", problem.queries);
  const DeviceBuffer keys = to_device("key_modality", problem.keys);
  Sums sums{DeviceBuffer("self", problem.columns() * sizeof(float)),
            DeviceBuffer("cross", problem.columns() * sizeof(float))};
  p.attn = attn.data();
  p.query_modality = static_cast<const int8_t*>(queries.data());
  p.key_modality = static_cast<const int8_t*>(keys.data());
  p.self = sums.self.data();
  p.cross = sums.cross.data();
  const size_t bytes = segmented_column_sum_cuda_workspace_bytes(p, device);
  const Plan plan = plan_segmented_column_sum_cuda(p, device);
  EXPECT_EQ(plan.workspace_bytes, static_cast<int64_t>(bytes));
  const uint32_t before = launches();
  expect_ok(segmented_column_sum_cuda(p, Launch(device, bytes).context()));
  if (in_harness()) {
    EXPECT_EQ(launches() - before, plan.launches);
  }
  return sums;
}

void check(const Problem& problem, const CudaDevice& device = devices()[0]) {
  const SegmentedColumnSumParams& p = problem.params;
  SCOPED_TRACE(testing::Message() << "B " << p.batch << ", H " << p.num_heads << ", O " << p.window << ", N "
                                  << p.keys << ", row stride " << p.attn_stride.row << ", offset "
                                  << problem.offset);
  const Buffer wide = widened(problem.attn);
  Buffer self(DType::kFloat64, problem.columns()), cross(DType::kFloat64, problem.columns());
  SegmentedColumnSumParams truth = p;
  truth.dtype = DType::kFloat64;
  truth.attn = wide.data();
  truth.query_modality = problem.queries.data();
  truth.key_modality = problem.keys.data();
  truth.self = self.data();
  truth.cross = cross.data();
  segmented_column_sum_cpu(truth);
  const Sums sums = run(problem, device);
  // Sums of positive numbers in float32, whatever the input.
  expect_close(sums.self, DType::kFloat32, self, 1e-5, 0);
  expect_close(sums.cross, DType::kFloat32, cross, 1e-5, 0);
}

TEST_P(SegmentedColumnSumCuda, MatchesTheFloat64Kernel) {
  uint32_t seed = 0;
  for (const int64_t keys : {1, 31, 64, 65, 130, 256, 300}) {
    for (const int64_t window : {1, 8, 21, 64, 100}) {
      seed_threads(++seed);
      check(Problem(GetParam(), {2, 2, window, keys}, seed));
    }
  }
}

// Vectors of 16 bytes, of 4 and of one element: by the length of a row, its stride and its address.
TEST_P(SegmentedColumnSumCuda, RowsOfAnyAlignment) {
  for (const int64_t keys : {512, 516, 514, 513}) check(Problem(GetParam(), {1, 2, 9, keys}, 1));
  for (const int64_t gap : {8, 4, 2, 1}) check(Problem(GetParam(), {1, 2, 9, 264, gap}, 2));
  for (const int64_t offset : {8, 4, 2, 1}) check(Problem(GetParam(), {1, 2, 9, 264, 0, offset}, 3));
}

TEST_P(SegmentedColumnSumCuda, LongWindowsAreSplit) {
  for (const CudaDevice& device : devices()) {
    for (const int64_t window : {1023, 1024, 2600}) {
      const Problem problem(GetParam(), {1, 1, window, 72}, 4);
      EXPECT_EQ(plan_segmented_column_sum_cuda(problem.params, device).launches, window < 1024 ? 1 : 2);
      check(problem, device);
    }
    check(Problem(GetParam(), {2, 1, 1100, 33}, 5), device);
  }
}

// Queries that do not observe come in long stretches where windows of different length share a batch.
TEST_P(SegmentedColumnSumCuda, NobodyObserves) {
  Problem problem(GetParam(), {2, 1, 300, 40}, 6);
  for (size_t i = 0; i < 450; ++i) problem.queries[i] = -1;
  check(problem);
}

TEST_P(SegmentedColumnSumCuda, EveryModalityThatAByteHolds) {
  Problem problem(GetParam(), {1, 1, 256, 256}, 7);
  for (size_t i = 0; i < 256; ++i) problem.queries[i] = problem.keys[255 - i] = static_cast<int8_t>(i);
  check(problem);
}

TEST_P(SegmentedColumnSumCuda, WhatDoesNotCountMayBeNan) {
  Problem problem(GetParam(), {1, 1, 3, 20}, 8);
  problem.queries = {0, -1, 1};
  problem.keys.assign(20, 0);
  problem.keys[4] = -1;
  for (size_t i = 0; i < 60; ++i) problem.attn.set(i, i / 20 == 1 || i % 20 == 4 ? NAN : 1.0);
  check(problem);
}

TEST_P(SegmentedColumnSumCuda, RowsThatDoNotObserveAreNotRead) {
  Problem problem(GetParam(), {1, 1, 2, 20}, 8);
  problem.params.window = 3;  // attn ends before the third
  problem.queries = {0, 1, -1};
  check(problem);
}

TEST_P(SegmentedColumnSumCuda, NanAndInfinityGoWhereTheyCount) {
  Problem problem(GetParam(), {1, 1, 70, 24}, 9);
  problem.attn.set(5, NAN);
  problem.attn.set(60 * 24 + 6, INFINITY);
  problem.attn.set(61 * 24 + 7, -INFINITY);
  problem.queries[0] = 0;
  problem.keys[5] = problem.keys[6] = problem.keys[7] = 1;
  check(problem);
}

TEST_P(SegmentedColumnSumCuda, OneRowMayStandForAll) {
  Problem problem(GetParam(), {2, 3, 10, 40}, 10);
  problem.params.attn_stride = {};
  check(problem);
  problem.params.attn_stride.row = 1;  // rows overlap
  check(problem);
}

// Neither do the access widths.
TEST_P(SegmentedColumnSumCuda, TheOrderOfThreadsDoesNotChangeABit) {
  for (const int64_t window : {70, 1100}) {
    Problem problem(GetParam(), {1, 1, window, 264}, 11);
    const CudaDevice device = devices()[1];
    const Sums first = run(problem, device);
    for (uint64_t seed = 20; seed < 23; ++seed) {
      seed_threads(seed);
      problem.offset = static_cast<int64_t>(seed) - 20;
      const Sums again = run(problem, device);
      EXPECT_EQ(again.self.bytes_now(), first.self.bytes_now());
      EXPECT_EQ(again.cross.bytes_now(), first.cross.bytes_now());
    }
  }
}

TEST_P(SegmentedColumnSumCuda, RandomProblems) {
  std::mt19937 random(12);
  const auto upto = [&](uint32_t limit) { return static_cast<int64_t>(random() % limit); };
  for (uint32_t round = 0; round < 25; ++round) {
    seed_threads(round);
    const Shape shape = {1 + upto(2),   1 + upto(3),       upto(90),
                         1 + upto(400), upto(2) * upto(9), upto(2) * upto(9)};
    check(Problem(GetParam(), shape, round), devices()[round % devices().size()]);
  }
}

TEST_P(SegmentedColumnSumCuda, EmptyProblems) {
  check(Problem(GetParam(), {2, 2, 0, 70}, 13));  // no queries: zeros
  for (const Shape& shape : {Shape{0, 2, 3, 4}, Shape{1, 0, 3, 4}, Shape{1, 2, 3, 0}})
    check(Problem(GetParam(), shape, 14));
}

TEST(SegmentedColumnSumCudaLauncher, RefusesASmallWorkspaceAndFloat64) {
  const CudaDevice device = devices()[0];
  Problem problem(DType::kFloat32, {1, 1, 1100, 32}, 15);
  const size_t bytes = segmented_column_sum_cuda_workspace_bytes(problem.params, device);
  ASSERT_GT(bytes, 0u);
  EXPECT_FALSE(segmented_column_sum_cuda(problem.params, Launch(device, bytes - 1).context()).ok());
  problem.params.dtype = DType::kFloat64;
  const CudaStatus status = segmented_column_sum_cuda(problem.params, Launch(device, 2 * bytes).context());
  EXPECT_STREQ(status.reason, "float64 is not supported on CUDA");
}

TEST(SegmentedColumnSumCudaLauncher, ThePlanCountsTheMatrixOnce) {
  const Problem problem(DType::kFloat16, {2, 3, 50, 100}, 16);
  const Plan plan = plan_segmented_column_sum_cuda(problem.params, devices()[0]);
  EXPECT_EQ(plan.bytes_read, 2 * 3 * 50 * 100 * 2 + 2 * (50 + 100));
  EXPECT_EQ(plan.bytes_written, 2 * 2 * 3 * 100 * 4);
}

CSP_INSTANTIATE_CUDA(SegmentedColumnSumCuda);

}  // namespace
}  // namespace csp::test
