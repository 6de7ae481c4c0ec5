#include "csp/prune.h"

#include <algorithm>

#include "csp/plan.h"
#include "support.h"

namespace csp::test {
namespace {

class PruneCuda : public PerCudaDType {};

struct Sizes {
  int64_t batch = 2, num_heads = 4, num_kv_heads = 2, window = 9, keys = 150, head_dim = 32, value_dim = 48,
          budget = 40;
};

// One problem on the device, and the outputs of one way to solve it.
struct Problem {
  Sizes sizes;
  int64_t score_heads;
  DeviceBuffer query, key, value, modality, window, lse;
  DeviceBuffer indices, lengths, key_out, value_out;
  PruneParams params;

  Problem(DType type, Heads heads, Sizes s = {}, bool with_lse = false)
      : sizes(s),
        score_heads(heads == Heads::kShared ? 1 : s.num_kv_heads),
        query(random("query", type, s.batch * s.num_heads * s.window * s.head_dim, 1)),
        key(random("key", type, s.batch * s.num_kv_heads * s.keys * s.head_dim, 2)),
        value(random("value", type, s.batch * s.num_kv_heads * s.keys * s.value_dim, 3)),
        modality(modalities("modality", s.batch * s.keys, 11)),
        window(modalities("query_modality", s.batch * s.window, 5)),
        lse(random("lse", DType::kFloat32, s.batch * s.num_heads * s.window, 4)),
        indices("indices", bytes(s.batch * score_heads * s.budget, sizeof(int32_t))),
        lengths("lengths", bytes(s.batch * score_heads, sizeof(int32_t))),
        key_out("key_out", bytes(s.batch * s.num_kv_heads * s.budget * s.head_dim, dtype_bytes(type))),
        value_out("value_out", bytes(s.batch * s.num_kv_heads * s.budget * s.value_dim, dtype_bytes(type))) {
    fill_score(type, heads, with_lse);
    fill_select();
    fill_compact();
  }

  Problem(const Problem&) = delete;

 private:
  static size_t bytes(int64_t count, int64_t each) { return static_cast<size_t>(count * each); }
  static DeviceBuffer random(const char* name, DType type, int64_t count, uint32_t seed) {
    return to_device(name, Buffer::random(type, static_cast<size_t>(count), seed));
  }
  // Text and images in runs, every `hole`th token padding.
  static DeviceBuffer modalities(const char* name, int64_t count, int64_t hole) {
    std::vector<int8_t> ids(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) ids[i] = static_cast<int8_t>(i % hole == 0 ? -1 : i % 7 < 4);
    return to_device(name, ids);
  }

  void fill_score(DType type, Heads heads, bool with_lse) {
    ScoreParams& p = params.score;
    p.dtype = type;
    p.query = query.data();
    p.query_stride = {sizes.num_heads * sizes.window * sizes.head_dim, sizes.window * sizes.head_dim,
                      sizes.head_dim};
    p.key = key.data();
    p.key_stride = {sizes.num_kv_heads * sizes.keys * sizes.head_dim, sizes.keys * sizes.head_dim,
                    sizes.head_dim};
    p.modality = static_cast<const int8_t*>(modality.data());
    p.query_modality = static_cast<const int8_t*>(window.data());
    if (with_lse) p.lse = lse.data();
    p.batch = sizes.batch;
    p.num_heads = sizes.num_heads;
    p.num_kv_heads = sizes.num_kv_heads;
    p.window = sizes.window;
    p.keys = sizes.keys;
    p.head_dim = sizes.head_dim;
    p.scale = 0.25;
    p.heads = heads;
  }

  void fill_select() {
    SelectParams& p = params.select;
    p.modality = params.score.modality;
    p.query_modality = params.score.query_modality;
    p.indices = static_cast<int32_t*>(indices.data());
    p.lengths = static_cast<int32_t*>(lengths.data());
    p.batch = sizes.batch;
    p.score_heads = score_heads;
    p.keys = sizes.keys;
    p.window = sizes.window;
    p.budget = sizes.budget;
    p.recent = std::min(sizes.window, sizes.budget);
    p.pool = Pool::kMax;
    p.combine = Combine::kCalibrated;
  }

  void fill_compact() {
    CompactParams& p = params.compact;
    p.element_bytes = dtype_bytes(params.score.dtype);
    p.key = key.data();
    p.value = value.data();
    p.key_stride = params.score.key_stride;
    p.value_stride = {sizes.num_kv_heads * sizes.keys * sizes.value_dim, sizes.keys * sizes.value_dim,
                      sizes.value_dim};
    p.indices = params.select.indices;
    p.key_out = key_out.data();
    p.value_out = value_out.data();
    p.batch = sizes.batch;
    p.num_kv_heads = sizes.num_kv_heads;
    p.score_heads = score_heads;
    p.keys = sizes.keys;
    p.budget = sizes.budget;
    p.head_dim = sizes.head_dim;
    p.value_dim = sizes.value_dim;
  }
};

void run_whole(const Problem& problem, const CudaDevice& device) {
  const Launch launch(device, prune_cuda_workspace_bytes(problem.params, device));
  expect_ok(prune_cuda(problem.params, launch.context()));
  problem.lengths.bytes_now();  // the workspace must outlive the kernels
}

// Score lists and scratch of their own for each part.
void run_parts(const Problem& problem, const CudaDevice& device) {
  PruneParams p = problem.params;
  const auto list =
      static_cast<size_t>(p.select.batch * p.select.score_heads * p.select.keys) * sizeof(float);
  const DeviceBuffer self("self", list), cross("cross", list);
  p.score.self = self.data();
  p.score.cross = cross.data();
  p.select.self = self.data();
  p.select.cross = cross.data();
  const Launch score(device, score_cuda_workspace_bytes(p.score, device));
  expect_ok(score_cuda(p.score, score.context()));
  const Launch select(device, select_cuda_workspace_bytes(p.select, device));
  expect_ok(select_cuda(p.select, select.context()));
  const Launch compact(device, 0);
  expect_ok(compact_cuda(p.compact, compact.context()));
  problem.lengths.bytes_now();
}

void expect_equal(const Problem& a, const Problem& b) {
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
      Problem whole(GetParam(), heads), parts(GetParam(), heads);
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
  const std::vector<Sizes> shapes = {
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
  for (const Sizes& sizes : shapes) {
    for (const bool with_lse : {false, true}) {
      SCOPED_TRACE(testing::Message() << sizes.keys << " keys, lse " << with_lse);
      const CudaDevice device = devices().back();
      Problem whole(DType::kFloat16, Heads::kKv, sizes, with_lse);
      Problem parts(DType::kFloat16, Heads::kKv, sizes, with_lse);
      for (Problem* problem : {&whole, &parts}) {
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
    const Problem problem(DType::kBFloat16, Heads::kKv);
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
  const Problem problem(DType::kFloat32, Heads::kKv, {.batch = 0});
  EXPECT_EQ(plan_prune_cuda(problem.params, devices()[0]).launches, 0);
  run_whole(problem, devices()[0]);
}

TEST(PruneCudaLauncher, WithoutKeysEverySlotIsFree) {
  const Problem problem(DType::kFloat32, Heads::kKv, {.window = 0, .keys = 0, .budget = 3});
  run_whole(problem, devices()[0]);
  EXPECT_EQ(problem.lengths.values<int32_t>(), std::vector<int32_t>(4, 0));
  EXPECT_EQ(problem.indices.values<int32_t>(), std::vector<int32_t>(12, -1));
  EXPECT_EQ(problem.key_out.values<float>(), std::vector<float>(12 * 32, 0));
  EXPECT_EQ(problem.value_out.values<float>(), std::vector<float>(12 * 48, 0));
}

TEST(PruneCudaLauncher, RefusesFloat64AndAWorkspaceTooSmall) {
  Problem problem(DType::kFloat32, Heads::kKv);
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
