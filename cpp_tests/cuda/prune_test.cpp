#include "csp/prune.h"

#include "csp/plan.h"
#include "prune_problem.h"

namespace csp::test {
namespace {

class PruneCuda : public PerCudaDType {};

void run_whole(const PruneProblem& problem, const CudaDevice& device) {
  const Launch launch(device, prune_cuda_workspace_bytes(problem.params, device));
  expect_ok(prune_cuda(problem.params, launch.context()));
  problem.lengths.bytes_now();  // the workspace must outlive the kernels
}

void run_parts(const PruneProblem& problem, const CudaDevice& device) {
  choose_by_parts(problem, device);
  expect_ok(compact_cuda(problem.params.compact, Launch(device, 0).context()));
  problem.lengths.bytes_now();
}

void expect_equal(const PruneProblem& a, const PruneProblem& b) {
  EXPECT_EQ(a.lengths.values<int32_t>(), b.lengths.values<int32_t>());
  EXPECT_EQ(a.indices.values<int32_t>(), b.indices.values<int32_t>());
  EXPECT_EQ(a.key_out.bytes_now(), b.key_out.bytes_now());
  EXPECT_EQ(a.value_out.bytes_now(), b.value_out.bytes_now());
}

TEST_P(PruneCuda, IsItsPartsBitForBit) {
  uint64_t seed = 0;
  const std::vector<CudaDevice> played = devices();
  for (const CudaDevice& device : played) {
    for (const Heads heads : {Heads::kKv, Heads::kShared}) {
      if (heads == Heads::kShared && device.capability != played.back().capability) continue;
      SCOPED_TRACE(testing::Message() << "sm_" << device.capability);
      PruneProblem whole(GetParam(), heads), parts(GetParam(), heads);
      seed_threads(++seed);
      run_whole(whole, device);
      seed_threads(++seed);
      run_parts(parts, device);
      expect_equal(whole, parts);
      EXPECT_EQ(whole.lengths.values<int32_t>()[0], whole.sizes.budget);
    }
  }
}

TEST(PruneCudaLauncher, ShapesAndOptions) {
  const std::vector<PruneSizes> shapes = {
      {.batch = 1,
       .num_heads = 2,
       .num_kv_heads = 1,
       .window = 3,
       .keys = 33,
       .head_dim = 7,
       .value_dim = 5,
       .budget = 4},
      {.batch = 3,
       .num_heads = 2,
       .num_kv_heads = 2,
       .window = 20,
       .keys = 20,
       .head_dim = 16,
       .value_dim = 16,
       .budget = 30},
      {.batch = 1,
       .num_heads = 6,
       .num_kv_heads = 2,
       .window = 40,
       .keys = 300,
       .head_dim = 64,
       .value_dim = 64,
       .budget = 100},
  };
  uint64_t seed = 100;
  for (const PruneSizes& sizes : shapes) {
    for (const bool with_lse : {false, true}) {
      SCOPED_TRACE(testing::Message() << sizes.keys << " keys, lse " << with_lse);
      const CudaDevice device = devices().back();
      PruneProblem whole(DType::kFloat16, Heads::kKv, sizes, with_lse);
      PruneProblem parts(DType::kFloat16, Heads::kKv, sizes, with_lse);
      for (PruneProblem* problem : {&whole, &parts}) {
        problem->params.select.combine = with_lse ? Combine::kUnion : Combine::kIntersection;
        problem->params.select.pool = with_lse ? Pool::kAvg : Pool::kNone;
        problem->params.score.causal = problem->params.select.causal = with_lse;
      }
      seed_threads(++seed);
      run_whole(whole, device);
      seed_threads(++seed);
      run_parts(parts, device);
      expect_equal(whole, parts);
    }
  }
}

TEST(PruneCudaLauncher, ThePlanIsWhatHappens) {
  for (const CudaDevice& device : devices()) {
    const PruneProblem problem(DType::kBFloat16, Heads::kKv);
    const Plan plan = plan_prune_cuda(problem.params, device);
    EXPECT_EQ(plan.workspace_bytes, static_cast<int64_t>(prune_cuda_workspace_bytes(problem.params, device)));
    const Plan score = plan_score_cuda(problem.params.score, device);
    const Plan select = plan_select_cuda(problem.params.select, device);
    const Plan compact = plan_compact_cuda(problem.params.compact, device);
    EXPECT_EQ(plan.bytes_read, score.bytes_read + select.bytes_read + compact.bytes_read);
    EXPECT_EQ(plan.bytes_written, score.bytes_written + select.bytes_written + compact.bytes_written);
    EXPECT_EQ(plan.flops, score.flops);
    EXPECT_EQ(plan.tasks, 0);
    const uint32_t before = launches();
    run_whole(problem, device);
    if (in_harness()) {
      EXPECT_EQ(launches() - before, plan.launches);
    }
  }
}

TEST(PruneCudaLauncher, AnEmptyBatchLaunchesNothing) {
  const PruneProblem problem(DType::kFloat32, Heads::kKv, {.batch = 0});
  EXPECT_EQ(plan_prune_cuda(problem.params, devices()[0]).launches, 0);
  run_whole(problem, devices()[0]);
}

TEST(PruneCudaLauncher, WithoutKeysEverySlotIsFree) {
  const PruneProblem problem(DType::kFloat32, Heads::kKv, {.window = 0, .keys = 0, .budget = 3});
  run_whole(problem, devices()[0]);
  EXPECT_EQ(problem.lengths.values<int32_t>(), std::vector<int32_t>(4, 0));
  EXPECT_EQ(problem.indices.values<int32_t>(), std::vector<int32_t>(12, -1));
  EXPECT_EQ(problem.key_out.values<float>(), std::vector<float>(12 * 32, 0));
  EXPECT_EQ(problem.value_out.values<float>(), std::vector<float>(12 * 48, 0));
}

TEST(PruneCudaLauncher, RefusesFloat64AndAWorkspaceTooSmall) {
  PruneProblem problem(DType::kFloat32, Heads::kKv);
  const CudaDevice device = devices()[0];
  const Launch small(device, prune_cuda_workspace_bytes(problem.params, device) - 1);
  EXPECT_FALSE(prune_cuda(problem.params, small.context()).ok());
  problem.params.score.dtype = DType::kFloat64;
  const CudaStatus status = prune_cuda(problem.params, small.context());
  EXPECT_FALSE(status.ok());
  EXPECT_STREQ(status.reason, "float64 is not supported on CUDA");
}

CSP_INSTANTIATE_CUDA(PruneCuda);

}  // namespace
}  // namespace csp::test
