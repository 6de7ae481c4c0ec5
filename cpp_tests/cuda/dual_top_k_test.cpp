#include "csp/dual_top_k.h"

#include <memory>

#include "csp/plan.h"
#include "support.h"

namespace csp::test {
namespace {

class DualTopKCuda : public PerCudaDType {};

struct Problem {
  DualTopKParams params;
  Buffer self, cross;
  std::vector<uint8_t> valid_self, valid_cross;  // empty: every key
  size_t offset = 0;                             // of the scores, in bytes

  Problem(DType dtype, int64_t rows, int64_t keys)
      : self(dtype, static_cast<size_t>(rows * keys)), cross(dtype, static_cast<size_t>(rows * keys)) {
    params.dtype = dtype;
    params.rows = rows;
    params.keys = keys;
  }

  void fill(uint32_t seed, uint32_t levels) {
    std::mt19937 generator(seed);
    const int middle = static_cast<int>(levels / 2);
    for (size_t i = 0; i < self.size(); ++i) {
      self.set(i, static_cast<int>(generator() % levels) - middle);
      cross.set(i, static_cast<int>(generator() % levels) - middle);
    }
  }
  void mask(uint32_t seed) {
    std::mt19937 generator(seed);
    for (auto* valid : {&valid_self, &valid_cross}) {
      valid->resize(self.size());
      for (uint8_t& v : *valid) v = generator() % 4 != 0;
    }
  }

  std::vector<uint8_t> on_cpu() {
    std::vector<uint8_t> out(self.size());
    DualTopKParams p = params;
    p.self = self.data();
    p.cross = cross.data();
    if (!valid_self.empty()) p.valid_self = reinterpret_cast<const bool*>(valid_self.data());
    if (!valid_cross.empty()) p.valid_cross = reinterpret_cast<const bool*>(valid_cross.data());
    p.mask = reinterpret_cast<bool*>(out.data());
    const Workspace workspace(dual_top_k_cpu_workspace_bytes(p, 1));
    dual_top_k_cpu(p, workspace.get());
    return out;
  }

  std::vector<uint8_t> on_device() {
    const DeviceBuffer own = to_device("self", self, offset), other = to_device("cross", cross, offset);
    const DeviceBuffer valid_own = to_device("valid_self", valid_self);
    const DeviceBuffer valid_other = to_device("valid_cross", valid_cross);
    const DeviceBuffer mask("mask", self.size());
    DualTopKParams p = params;
    p.self = own.data();
    p.cross = other.data();
    if (!valid_self.empty()) p.valid_self = static_cast<const bool*>(valid_own.data());
    if (!valid_cross.empty()) p.valid_cross = static_cast<const bool*>(valid_other.data());
    p.mask = static_cast<bool*>(mask.data());
    const CudaDevice device = devices()[0];
    expect_ok(dual_top_k_cuda(p, Launch(device, dual_top_k_cuda_workspace_bytes(p, device)).context()));
    return mask.values<uint8_t>();
  }

  void check() {
    SCOPED_TRACE(testing::Message() << params.rows << " x " << params.keys << ", k " << params.k_self << " "
                                    << params.k_cross << ", masks " << !valid_self.empty());
    ASSERT_EQ(on_device(), on_cpu());
  }
};

TEST_P(DualTopKCuda, MatchesTheCpuKernel) {
  uint32_t seed = 0;
  for (const int64_t keys : {1, 5, 48, 300, 1500}) {
    for (const uint32_t levels : {1u, 3u, 200u}) {
      for (const int64_t k : {int64_t{0}, int64_t{1}, keys / 3, keys + 9}) {
        seed_threads(++seed);
        Problem problem(GetParam(), 2, keys);
        problem.fill(seed, levels);
        if (seed % 3 == 0) problem.mask(seed);
        problem.params.k_self = k;
        problem.params.k_cross = keys / 2;
        problem.params.combine = seed % 2 == 0 ? Combine::kUnion : Combine::kIntersection;
        problem.offset = seed % 4 == 0 ? static_cast<size_t>(dtype_bytes(GetParam())) : 0;
        problem.check();
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(DualTopKCuda, RealScores) {
  for (const int64_t keys : {1024, 2500}) {
    Problem problem(GetParam(), 2, keys);
    problem.self = Buffer::random(GetParam(), problem.self.size(), 3);
    problem.cross = Buffer::random(GetParam(), problem.self.size(), 4, 1e-6);
    problem.params.k_self = keys / 10;
    problem.params.k_cross = keys / 4;
    problem.check();
    problem.params.combine = Combine::kUnion;
    problem.mask(9);
    problem.check();
  }
}

TEST_P(DualTopKCuda, OrdersSpecialValuesAsNumbersAndNaNLast) {
  const double values[] = {NAN, -INFINITY, -1, 0.0, -0.0, INFINITY, 1, -NAN};
  Problem problem(GetParam(), 1, 8);
  for (size_t i = 0; i < 8; ++i) {
    problem.self.set(i, values[i]);
    problem.cross.set(i, values[i]);
  }
  for (int64_t k = 0; k <= 8; ++k) {
    problem.params.k_self = problem.params.k_cross = k;
    problem.check();
  }
}

TEST_P(DualTopKCuda, OneListValidNowhere) {
  Problem problem(GetParam(), 1, 40);
  problem.fill(1, 9);
  problem.mask(1);
  problem.valid_cross.assign(40, 0);
  problem.params.k_self = problem.params.k_cross = 7;
  for (const Combine combine : {Combine::kIntersection, Combine::kUnion}) {
    problem.params.combine = combine;
    problem.check();
  }
}

TEST(DualTopKCudaLauncher, EmptyProblemsLaunchNothing) {
  DualTopKParams params;
  for (const auto& [rows, keys] : {std::pair<int64_t, int64_t>{0, 5}, {3, 0}}) {
    params.rows = rows;
    params.keys = keys;
    expect_ok(dual_top_k_cuda(params, Launch(devices()[0], 0).context()));
    EXPECT_EQ(plan_dual_top_k_cuda(params, devices()[0]).launches, 0);
  }
}

TEST(DualTopKCudaLauncher, RefusesFloat64) {
  DualTopKParams params;
  params.dtype = DType::kFloat64;
  params.rows = params.keys = 1;
  EXPECT_STREQ(dual_top_k_cuda(params, Launch(devices()[0], 0).context()).reason,
               "float64 is not supported on CUDA");
}

CSP_INSTANTIATE_CUDA(DualTopKCuda);

}  // namespace
}  // namespace csp::test
