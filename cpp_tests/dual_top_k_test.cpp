#include "csp/dual_top_k.h"

#include <memory>

#include "support.h"

namespace csp::test {
namespace {

class DualTopK : public PerIsaAndDType {};

struct Problem {
  int64_t rows, keys, k_self, k_cross;
  Combine combine;
  const bool* valid_self = nullptr;
  const bool* valid_cross = nullptr;
};

std::vector<char> run(const Buffer& self, const Buffer& cross, DType dtype, const Problem& problem,
                      const Parallel& parallel = {}) {
  const auto mask = std::make_unique<bool[]>(self.size() + 1);
  DualTopKParams params;
  params.dtype = dtype;
  params.self = self.data();
  params.cross = cross.data();
  params.valid_self = problem.valid_self;
  params.valid_cross = problem.valid_cross;
  params.mask = mask.get();
  params.rows = problem.rows;
  params.keys = problem.keys;
  params.k_self = problem.k_self;
  params.k_cross = problem.k_cross;
  params.combine = problem.combine;
  const Workspace workspace(dual_top_k_cpu_workspace_bytes(params, parallel.num_threads));
  dual_top_k_cpu(params, workspace.get(), parallel);
  return {mask.get(), mask.get() + self.size()};
}

// Whether fewer than k valid keys of the row come before this one.
bool in_top(const Buffer& scores, const bool* valid, int64_t row, int64_t keys, int64_t key, int64_t k) {
  const auto at = [&](int64_t i) { return scores.read(row * keys + i); };
  const auto counts = [&](int64_t i) { return !valid || valid[row * keys + i]; };
  if (!counts(key)) return false;
  int64_t before = 0;
  for (int64_t i = 0; i < keys; ++i) {
    before += counts(i) && (at(i) > at(key) || (at(i) == at(key) && i > key));
  }
  return before < k;
}

Buffer levels(DType dtype, int64_t size, int count, uint32_t seed) {
  Buffer buffer(dtype, size);
  std::mt19937 generator(seed);
  for (int64_t i = 0; i < size; ++i) buffer.set(i, static_cast<int>(generator() % count) - count / 2);
  return buffer;
}

TEST_P(DualTopK, MatchesTheDefinition) {
  const int64_t rows = 2;
  for (const int64_t keys : {1, 5, 47, 300}) {
    const auto valid_self = std::make_unique<bool[]>(rows * keys);
    const auto valid_cross = std::make_unique<bool[]>(rows * keys);
    for (int64_t i = 0; i < rows * keys; ++i) {
      valid_self[i] = i % 3 != 0;
      valid_cross[i] = i % 5 != 1;
    }
    for (const int count : {1, 3, 200}) {
      const Buffer self = levels(dtype(), rows * keys, count, 1),
                   cross = levels(dtype(), rows * keys, count, 2);
      for (const int64_t k : {int64_t{0}, int64_t{1}, keys / 3, keys + 9}) {
        for (const Combine combine : {Combine::kIntersection, Combine::kUnion}) {
          for (const bool masks : {false, true}) {
            const Problem problem{rows,
                                  keys,
                                  k,
                                  keys / 2,
                                  combine,
                                  masks ? valid_self.get() : nullptr,
                                  masks ? valid_cross.get() : nullptr};
            const std::vector<char> mask = run(self, cross, dtype(), problem);
            for (int64_t row = 0; row < rows; ++row) {
              for (int64_t key = 0; key < keys; ++key) {
                const bool own = in_top(self, problem.valid_self, row, keys, key, k);
                const bool other = in_top(cross, problem.valid_cross, row, keys, key, keys / 2);
                const bool want = combine == Combine::kUnion ? own || other : own && other;
                ASSERT_EQ(mask[row * keys + key] != 0, want)
                    << "keys " << keys << " k " << k << " key " << key;
              }
            }
          }
        }
      }
    }
  }
}

TEST_P(DualTopK, OrdersSpecialValuesAsNumbersAndNaNLast) {
  // Best first: inf, 1, the later zero, the other zero, -1, -inf, NaN.
  const double values[] = {NAN, -INFINITY, -1, 0.0, -0.0, INFINITY, 1};
  const std::vector<int> best_first = {5, 6, 4, 3, 2, 1, 0};
  Buffer scores(dtype(), 7);
  for (size_t i = 0; i < 7; ++i) scores.set(i, values[i]);
  for (int k = 0; k <= 7; ++k) {
    std::vector<char> want(7, 0);
    for (int i = 0; i < k; ++i) want[best_first[i]] = 1;
    EXPECT_EQ(run(scores, scores, dtype(), {1, 7, k, k, Combine::kIntersection}), want) << "k " << k;
  }
}

TEST_P(DualTopK, EmptyProblems) {
  const Buffer none(dtype(), 0);
  EXPECT_TRUE(run(none, none, dtype(), {0, 5, 1, 1, Combine::kUnion}).empty());
  EXPECT_TRUE(run(none, none, dtype(), {3, 0, 1, 1, Combine::kUnion}).empty());
}

TEST_P(DualTopK, ThreadsDoNotChangeABit) {
  const Buffer self = Buffer::random(dtype(), 20 * 700, 3), cross = Buffer::random(dtype(), 20 * 700, 4);
  const Problem problem{20, 700, 90, 300, Combine::kIntersection};
  EXPECT_EQ(run(self, cross, dtype(), problem), run(self, cross, dtype(), problem, threads(3)));
}

CSP_INSTANTIATE(DualTopK);

}  // namespace
}  // namespace csp::test
