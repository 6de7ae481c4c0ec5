#include "csp/select.h"

#include "csp/plan.h"
#include "select_plan.h"
#include "support.h"

namespace csp::test {
namespace {

class SelectCuda : public PerCudaDType {};

// Both paths: the rows of a block, and the sorts with every row in a group of its own.
constexpr SelectLimits kBlocks, kSorts{0, 1};

struct Problem {
  SelectParams params;
  Buffer self, cross;
  std::vector<int8_t> modality, query_modality;
  std::vector<int32_t> indices, lengths;
  CudaDevice device = devices().back();
  SelectLimits limits;

  Problem(DType dtype, int64_t batch, int64_t heads, int64_t keys, int64_t window)
      : self(dtype, static_cast<size_t>(batch * heads * keys)),
        cross(dtype, static_cast<size_t>(batch * heads * keys)),
        modality(static_cast<size_t>(batch * keys), 0),
        query_modality(static_cast<size_t>(batch * window), 0) {
    params.dtype = dtype;
    params.batch = batch;
    params.score_heads = heads;
    params.keys = keys;
    params.window = window;
  }

  // Scores of few small whole numbers: ties everywhere.
  void fill(uint32_t seed, uint32_t levels) {
    std::mt19937 generator(seed);
    for (size_t i = 0; i < self.size(); ++i) {
      self.set(i, generator() % levels);
      cross.set(i, generator() % levels);
    }
    fill_modality(seed);
  }
  // Scores spread over many powers of two, as softmax makes them.
  void fill_real(uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(-8, 3);
    for (size_t i = 0; i < self.size(); ++i) {
      self.set(i, std::exp2(normal(generator)));
      cross.set(i, std::exp2(normal(generator)));
    }
    fill_modality(seed);
  }
  void fill_modality(uint32_t seed) {
    std::mt19937 generator(seed + 77);
    int8_t run = 0;
    for (int8_t& m : modality) {
      if (generator() % 12 == 0) run = static_cast<int8_t>(generator() % 3 * 60);
      m = generator() % 9 == 0 ? int8_t{-1} : run;
    }
    for (int8_t& m : query_modality) m = static_cast<int8_t>((static_cast<int>(generator() % 4) - 1) * 60);
  }

  void on_cpu() {
    const size_t rows = static_cast<size_t>(params.batch * params.score_heads);
    indices.assign(rows * static_cast<size_t>(params.budget), -7);
    lengths.assign(rows, -7);
    SelectParams p = params;
    p.self = self.data();
    p.cross = cross.data();
    p.modality = modality.data();
    p.query_modality = query_modality.data();
    p.indices = indices.data();
    p.lengths = lengths.data();
    const Workspace workspace(select_cpu_workspace_bytes(p, 1));
    select_cpu(p, workspace.get());
  }

  // The slots of every row, then the lengths.
  std::pair<std::vector<int32_t>, std::vector<int32_t>> on_device() const {
    const DeviceBuffer own = to_device("self", self), other = to_device("cross", cross);
    const DeviceBuffer keys_of = to_device("modality", modality);
    const DeviceBuffer queries_of = to_device("query_modality", query_modality);
    const size_t rows = static_cast<size_t>(params.batch * params.score_heads);
    const DeviceBuffer slots("indices", rows * static_cast<size_t>(params.budget) * sizeof(int32_t));
    const DeviceBuffer sizes("lengths", rows * sizeof(int32_t));
    SelectParams p = params;
    p.self = own.data();
    p.cross = other.data();
    p.modality = static_cast<const int8_t*>(keys_of.data());
    p.query_modality = static_cast<const int8_t*>(queries_of.data());
    p.indices = static_cast<int32_t*>(slots.data());
    p.lengths = static_cast<int32_t*>(sizes.data());
    const SelectPlan plan = make_select_plan(p, device, limits);
    const uint32_t before = launches();
    expect_ok(launch_select(p, plan, Launch(device, static_cast<size_t>(plan.workspace_bytes)).context()));
    EXPECT_TRUE(!in_harness() || launches() - before == plan.launches);
    return {slots.values<int32_t>(), sizes.values<int32_t>()};
  }

  void check() {
    const SelectParams& p = params;
    SCOPED_TRACE(testing::Message() << "L " << p.keys << ", O " << p.window << ", T " << p.budget << ", R "
                                    << p.recent << ", combine " << static_cast<int>(p.combine) << ", pool "
                                    << static_cast<int>(p.pool) << " " << p.pool_kernel << ", rho "
                                    << p.rho_thousandths << ", k_self " << p.k_self << ", sorts "
                                    << (limits.block_keys == 0));
    on_cpu();
    const auto [slots, sizes] = on_device();
    ASSERT_EQ(sizes, lengths);
    ASSERT_EQ(slots, indices);
  }
};

// Draws the options of a problem.
void draw_options(std::mt19937& generator, SelectParams& p) {
  constexpr int32_t kRhos[] = {0, 123, 500, 900, 1000};
  p.budget = static_cast<int64_t>(generator() % static_cast<uint32_t>(p.keys * 5 / 4 + 2));
  p.recent = std::min<int64_t>(p.budget, generator() % 3 == 0 ? p.budget : generator() % 9);
  p.combine = static_cast<Combine>(generator() % 3);
  p.pool = static_cast<Pool>(generator() % 4);
  p.pool_kernel = 1 + 2 * (generator() % 7);
  p.rho_thousandths = kRhos[generator() % 5];
  p.causal = generator() % 3 != 0;
  p.k_self = p.k_cross = -1;
  if (p.combine != Combine::kCalibrated && generator() % 3 == 0) {
    p.k_self = static_cast<int64_t>(generator() % static_cast<uint32_t>(p.budget - p.recent + 1));
    p.k_cross = p.budget - p.recent - p.k_self;
  }
}

// Random problems, every one in another order of threads.
void check_random(DType dtype, const SelectLimits& limits, int problems, uint32_t most_keys) {
  std::mt19937 generator(static_cast<uint32_t>(dtype) + most_keys);
  for (int i = 0; i < problems; ++i) {
    const int64_t keys = 1 + generator() % most_keys;
    Problem problem(dtype, 1 + i % 2, 1 + i % 3 / 2, keys, std::min<int64_t>(keys, generator() % 24));
    problem.fill(generator(), i % 4 == 0 ? 1 + generator() % 4 : 300);
    if (i % 4 == 1) problem.fill_real(generator());
    draw_options(generator, problem.params);
    seed_threads(generator());
    const std::vector<CudaDevice> all = devices();
    problem.device = all[generator() % all.size()];
    problem.limits = limits;
    problem.check();
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST_P(SelectCuda, MatchesTheCpuKernel) {
  check_random(GetParam(), kBlocks, 150, 90);
  check_random(GetParam(), kBlocks, 16, 700);
}

TEST_P(SelectCuda, SortsMatchTheCpuKernel) {
  check_random(GetParam(), kSorts, 12, 120);
}

// Scores that crowd into few bins.
TEST(SelectCudaScores, CrowdsAreDispersed) {
  const auto score = [](int kind, uint32_t random) {
    switch (kind) {
      case 0:
        return 0.25;
      case 1:
        return random % 2 ? 1.0 : 0.0;
      case 2:
        return std::ldexp(1.0, -static_cast<int>(random % 120));
      case 3:  // one far out, the others side by side
        return random % 300 == 0 ? 3e38 : 1 + 1e-6 * (random % 50);
      default:
        return random % 3 == 0 ? NAN : random % 3 == 1 ? INFINITY : -static_cast<double>(random % 7);
    }
  };
  for (int kind = 0; kind < 5; ++kind) {
    for (const Combine combine : {Combine::kIntersection, Combine::kUnion, Combine::kCalibrated}) {
      Problem problem(DType::kFloat32, 1, 1, 500, 9);
      std::mt19937 generator(static_cast<uint32_t>(kind));
      for (size_t i = 0; i < 500; ++i) {
        problem.self.set(i, score(kind, generator()));
        problem.cross.set(i, score(kind, generator()));
      }
      problem.fill_modality(3);
      problem.params.combine = combine;
      problem.params.budget = 130;
      problem.params.recent = 4;
      problem.params.pool = static_cast<Pool>((kind + 1) % 4);
      problem.check();
      if (HasFatalFailure()) return;
    }
  }
}

// Near windows that lie inside one run and wide ones: what follows the peak is kept, and what follows a NaN.
TEST(SelectCudaScores, PastTakesTheCandidatesBefore) {
  for (const SelectLimits& limits : {kBlocks, kSorts}) {
    for (const int32_t half : {0, 1, 3, 4, 5, 11}) {
      for (const int32_t peak : {0, 17, 18, 19, 20, 50}) {
        Problem problem(DType::kFloat32, 1, 1, 64, 1);
        problem.modality.assign(64, 0);
        problem.self.set(static_cast<size_t>(peak), 5);
        if (half > 1) problem.self.set(static_cast<size_t>(peak) + 1, NAN);
        problem.limits = limits;
        SelectParams& p = problem.params;
        p.rho_thousandths = 0;
        p.pool = Pool::kPast;
        p.pool_kernel = 2 * half + 1;
        p.budget = half + 1;
        problem.check();
        for (int32_t i = 0; i <= half; ++i) EXPECT_EQ(problem.indices[static_cast<size_t>(i)], peak + i);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// A row that does not fit into shared memory lies in the workspace; where not even its bins fit, it is
// sorted.
TEST(SelectCudaScores, LittleSharedMemory) {
  for (const Combine combine : {Combine::kIntersection, Combine::kCalibrated}) {
    for (const int64_t shared : {16 << 10, 9 << 10}) {
      Problem problem(DType::kFloat32, 2, 5, 300, 9);
      problem.fill_real(8);
      problem.params.combine = combine;
      problem.params.pool = Pool::kMax;
      problem.params.budget = 80;
      problem.device.multiprocessors = 2;
      problem.device.shared_bytes = shared;
      const SelectPlan plan = make_select_plan(problem.params, problem.device);
      EXPECT_EQ(plan.by_block, shared > 10 << 10);
      EXPECT_FALSE(plan.by_block && plan.in_shared);
      problem.check();
    }
  }
}

TEST(SelectCudaScores, SortsOfSeveralTiles) {
  for (const auto& [combine, keys] :
       {std::pair{Combine::kIntersection, 9000}, {Combine::kCalibrated, 40000}}) {
    Problem problem(DType::kFloat32, 1, 1, keys, 9);
    problem.fill_real(4);
    if (keys < 32768) problem.limits = kSorts;
    problem.params.combine = combine;
    problem.params.pool = Pool::kMax;
    problem.params.budget = 2000;
    problem.params.rho_thousandths = 437;
    problem.check();
  }
}

TEST(SelectCudaScores, LongRowsInABlock) {
  for (const Combine combine : {Combine::kUnion, Combine::kCalibrated}) {
    Problem problem(DType::kFloat32, 1, 1, 5000, 9);
    problem.fill_real(5);
    problem.params.combine = combine;
    problem.params.budget = 900;
    problem.check();
  }
}

TEST(SelectCudaScores, TheOrderOfThreadsDoesNotChangeABit) {
  for (const SelectLimits& limits : {kBlocks, kSorts}) {
    Problem problem(DType::kFloat16, 1, 2, 200, 9);
    problem.fill_real(6);
    problem.limits = limits;
    problem.params.combine = limits.block_keys == 0 ? Combine::kCalibrated : Combine::kUnion;
    problem.params.pool = Pool::kAvg;
    problem.params.budget = 50;
    const auto first = problem.on_device();
    seed_threads(99);
    EXPECT_EQ(problem.on_device(), first);
  }
}

TEST(SelectCudaLauncher, EmptyProblems) {
  for (const auto& [batch, heads, keys] : {std::tuple{0, 2, 5}, {2, 0, 5}, {2, 3, 0}}) {
    Problem problem(DType::kFloat32, batch, heads, keys, std::min(keys, 2));
    problem.params.budget = 4;
    problem.check();
  }
}

TEST(SelectCudaLauncher, RefusesFloat64AndASmallWorkspace) {
  SelectParams params;
  params.batch = params.score_heads = 1;
  params.keys = 1 << 16;
  params.budget = 3;
  const CudaDevice device = devices()[0];
  const size_t bytes = select_cuda_workspace_bytes(params, device);
  EXPECT_GT(bytes, 0u);
  EXPECT_FALSE(select_cuda(params, Launch(device, bytes - 1).context()).ok());
  params.dtype = DType::kFloat64;
  EXPECT_STREQ(select_cuda(params, Launch(device, bytes).context()).reason,
               "float64 is not supported on CUDA");
}

TEST(SelectCudaPlan, LaunchesDoNotDependOnTheBudget) {
  SelectParams params;
  params.batch = 2;
  params.score_heads = 8;
  for (const Combine combine : {Combine::kIntersection, Combine::kCalibrated}) {
    params.combine = combine;
    for (const int64_t keys : {4096, 32768, 1 << 20}) {
      params.keys = keys;
      int64_t launches = 0;
      for (const int64_t budget : {1, 4096, 1 << 19}) {
        params.budget = budget;
        const Plan plan = plan_select_cuda(params, CudaDevice());
        EXPECT_TRUE(budget == 1 || plan.launches == launches);
        launches = plan.launches;
        EXPECT_EQ(plan.workspace_bytes,
                  static_cast<int64_t>(select_cuda_workspace_bytes(params, CudaDevice())));
      }
      EXPECT_EQ(launches == 1, keys <= 32768);
    }
  }
}

// 64 KiB hold the bins of about 15000 candidates; a cut needs none.
TEST(SelectCudaPlan, LittleSharedMemoryMovesLongRowsToTheSorts) {
  const CudaDevice turing{40, 75, 64 << 10, 4 << 20};
  SelectParams params;
  params.batch = params.score_heads = 1;
  params.budget = 100;
  for (const int64_t keys : {14000, 20000, 32768}) {
    params.keys = keys;
    params.combine = Combine::kIntersection;
    EXPECT_EQ(make_select_plan(params, turing).by_block, keys < 15000);
    params.combine = Combine::kCalibrated;
    EXPECT_TRUE(make_select_plan(params, turing).by_block);
  }
}

CSP_INSTANTIATE_CUDA(SelectCuda);

}  // namespace
}  // namespace csp::test
