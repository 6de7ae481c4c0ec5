#include "csp/prune_in_place.h"

#include "csp/plan.h"
#include "prune_problem.h"

namespace csp::test {
namespace {

class PruneInPlaceCuda : public PerCudaDType {};

// A problem that is solved in its own caches.
struct InPlace : PruneProblem {
  InPlace(DType type, Heads heads, PruneSizes s = {}, bool with_lse = false)
      : PruneProblem(type, heads, s, with_lse) {
    params.compact.key_out = key.data();
    params.compact.value_out = value.data();
  }
};

void run_whole(const InPlace& problem, const CudaDevice& device) {
  const Launch launch(device, prune_cuda_workspace_bytes(problem.params, device));
  expect_ok(prune_in_place_cuda(problem.params, launch.context()));
  problem.lengths.bytes_now();  // the workspace must outlive the kernels
}

void run_parts(const InPlace& problem, const CudaDevice& device) {
  choose_by_parts(problem, device);
  expect_ok(compact_in_place_cuda(problem.params.compact, Launch(device, 0).context()));
  problem.lengths.bytes_now();
}

// Every byte of both caches, so those behind the budget too.
void expect_equal(const InPlace& a, const InPlace& b) {
  EXPECT_EQ(a.lengths.values<int32_t>(), b.lengths.values<int32_t>());
  EXPECT_EQ(a.indices.values<int32_t>(), b.indices.values<int32_t>());
  EXPECT_EQ(a.key.bytes_now(), b.key.bytes_now());
  EXPECT_EQ(a.value.bytes_now(), b.value.bytes_now());
}

TEST_P(PruneInPlaceCuda, IsItsPartsBitForBit) {
  uint64_t seed = 0;
  const std::vector<CudaDevice> played = devices();
  for (const CudaDevice& device : played) {
    for (const Heads heads : {Heads::kKv, Heads::kShared}) {
      if (heads == Heads::kShared && device.capability != played.back().capability) continue;
      SCOPED_TRACE(testing::Message() << "sm_" << device.capability);
      InPlace whole(GetParam(), heads), parts(GetParam(), heads);
      const std::vector<std::byte> before = whole.key.bytes_now();
      seed_threads(++seed);
      run_whole(whole, device);
      seed_threads(++seed);
      run_parts(parts, device);
      expect_equal(whole, parts);
      EXPECT_NE(whole.key.bytes_now(), before);
      EXPECT_EQ(whole.lengths.values<int32_t>()[0], whole.sizes.budget);
    }
  }
}

TEST(PruneInPlaceCudaLauncher, ShapesAndOptions) {
  const std::vector<PruneSizes> shapes = {
      {.batch = 1,
       .num_heads = 2,
       .num_kv_heads = 1,
       .window = 3,
       .keys = 33,
       .head_dim = 7,
       .value_dim = 5,
       .budget = 4},
      // as many slots as keys: padding leaves some free, so rows move to the right
      {.batch = 3,
       .num_heads = 2,
       .num_kv_heads = 2,
       .window = 20,
       .keys = 30,
       .head_dim = 16,
       .value_dim = 16,
       .budget = 30},
  };
  uint64_t seed = 100;
  for (const PruneSizes& sizes : shapes) {
    for (const bool with_lse : {false, true}) {
      SCOPED_TRACE(testing::Message() << sizes.keys << " keys, lse " << with_lse);
      const CudaDevice device = devices().back();
      const InPlace whole(DType::kFloat16, Heads::kKv, sizes, with_lse);
      const InPlace parts(DType::kFloat16, Heads::kKv, sizes, with_lse);
      seed_threads(++seed);
      run_whole(whole, device);
      seed_threads(++seed);
      run_parts(parts, device);
      expect_equal(whole, parts);
    }
  }
}

TEST(PruneInPlaceCudaLauncher, ThePlanIsWhatHappens) {
  for (const CudaDevice& device : devices()) {
    const InPlace problem(DType::kBFloat16, Heads::kKv);
    const Plan plan = plan_prune_in_place_cuda(problem.params, device);
    EXPECT_EQ(plan.workspace_bytes, static_cast<int64_t>(prune_cuda_workspace_bytes(problem.params, device)));
    const uint32_t before = launches();
    run_whole(problem, device);
    if (in_harness()) {
      EXPECT_EQ(launches() - before, plan.launches);
    }
  }
}

TEST(PruneInPlaceCudaLauncher, AnEmptyBatchLaunchesNothing) {
  const InPlace problem(DType::kFloat32, Heads::kKv, {.batch = 0});
  EXPECT_EQ(plan_prune_in_place_cuda(problem.params, devices()[0]).launches, 0);
  run_whole(problem, devices()[0]);
}

TEST(PruneInPlaceCudaLauncher, WhatItRefusesStaysAsItWas) {
  InPlace problem(DType::kFloat32, Heads::kKv);
  const CudaDevice device = devices()[0];
  const std::vector<std::byte> key = problem.key.bytes_now(), value = problem.value.bytes_now();
  const Launch small(device, prune_cuda_workspace_bytes(problem.params, device) - 1);
  EXPECT_FALSE(prune_in_place_cuda(problem.params, small.context()).ok());
  problem.params.score.dtype = DType::kFloat64;
  EXPECT_STREQ(prune_in_place_cuda(problem.params, small.context()).reason,
               "float64 is not supported on CUDA");
  EXPECT_EQ(problem.key.bytes_now(), key);
  EXPECT_EQ(problem.value.bytes_now(), value);
}

CSP_INSTANTIATE_CUDA(PruneInPlaceCuda);

}  // namespace
}  // namespace csp::test
