#include "csp/select.h"

#include <algorithm>
#include <memory>

#include "support.h"

namespace csp::test {
namespace {

class Select : public PerIsaAndDType {};

// A problem with the buffers that its params point to.
struct Problem {
  SelectParams params;
  Buffer self, cross;
  std::vector<int8_t> modality, query_modality;
  std::vector<int32_t> indices, lengths;

  Problem(DType dtype, int64_t batch, int64_t heads, int64_t keys, int64_t window)
      : self(dtype, batch * heads * keys),
        cross(dtype, batch * heads * keys),
        modality(batch * keys, 0),
        query_modality(batch * window, 0) {
    params.dtype = dtype;
    params.batch = batch;
    params.score_heads = heads;
    params.keys = keys;
    params.window = window;
  }

  // Scores of few small whole numbers: ties everywhere, and sums exact in every dtype.
  void fill(uint32_t seed, int levels) {
    std::mt19937 generator(seed);
    for (size_t i = 0; i < self.size(); ++i) {
      self.set(i, generator() % levels);
      cross.set(i, generator() % levels);
    }
    for (size_t i = 0; i < modality.size(); ++i)
      modality[i] = generator() % 11 / 4 - (generator() % 8 == 0 ? 3 : 0);
    for (int8_t& m : modality) m = m < 0 ? -1 : m;
    for (int8_t& m : query_modality) m = static_cast<int8_t>(static_cast<int>(generator() % 3) - 1);
  }

  void run(const Parallel& parallel = {}) {
    indices.assign(params.batch * params.score_heads * params.budget, -7);
    lengths.assign(params.batch * params.score_heads, -7);
    params.self = self.data();
    params.cross = cross.data();
    params.modality = modality.data();
    params.query_modality = query_modality.data();
    params.indices = indices.data();
    params.lengths = lengths.data();
    const Workspace workspace(select_cpu_workspace_bytes(params, parallel.num_threads));
    select_cpu(params, workspace.get(), parallel);
  }
};

struct Candidate {
  int64_t position;
  double self, cross, tie;
  bool valid_self = false, valid_cross = false;
  int64_t rank_self = 0, rank_cross = 0;
};

bool tie_before(const Candidate& a, const Candidate& b) {
  return a.tie > b.tie || (a.tie == b.tie && a.position > b.position);
}

std::vector<Candidate> candidates_of(const Problem& problem, int64_t row, int64_t recent,
                                     const std::vector<int64_t>& real) {
  const SelectParams& p = problem.params;
  const int8_t* modality = problem.modality.data() + row / p.score_heads * p.keys;
  const int8_t* queries = problem.query_modality.data() + row / p.score_heads * p.window;
  const int64_t count = std::max<int64_t>(static_cast<int64_t>(real.size()) - recent, 0);
  std::vector<Candidate> out(count);
  const auto score = [&](const Buffer& scores, int64_t c) { return scores.read(row * p.keys + real[c]); };
  for (int64_t c = 0; c < count; ++c) {
    Candidate& it = out[c];
    const int64_t j = it.position = real[c];
    it.self = score(problem.self, c);
    it.cross = score(problem.cross, c);
    it.tie = it.self + it.cross;
    for (int64_t i = 0; i < p.window; ++i) {
      if (queries[i] < 0 || (p.causal && j > p.keys - p.window + i)) continue;
      (queries[i] == modality[j] ? it.valid_self : it.valid_cross) = true;
    }
    if (p.pool != Pool::kMax && p.pool != Pool::kPast) continue;
    for (const int64_t step : {-1, 1}) {
      if (step > 0 && p.pool == Pool::kPast) continue;
      for (int64_t n = c; n >= 0 && n < count && std::abs(n - c) <= p.pool_kernel / 2; n += step) {
        if (modality[real[n]] != modality[j]) break;
        it.self = std::max(it.self, score(problem.self, n));
        it.cross = std::max(it.cross, score(problem.cross, n));
      }
    }
  }
  for (Candidate& a : out) {
    for (const Candidate& b : out) {
      a.rank_self += b.valid_self && (b.self > a.self || (b.self == a.self && !tie_before(a, b)));
      a.rank_cross += b.valid_cross && (b.cross > a.cross || (b.cross == a.cross && !tie_before(a, b)));
    }
  }
  return out;
}

int64_t key_of(const Candidate& c, const SelectParams& p) {
  constexpr int64_t far = INT64_MAX;
  const int64_t rho = p.rho_thousandths;
  if (!c.valid_self && !c.valid_cross) return far;
  if (rho == 0) return c.valid_self ? c.rank_self : p.keys + c.rank_cross;
  if (rho == 1000) return c.valid_cross ? c.rank_cross : p.keys + c.rank_self;
  const bool smaller = p.combine == Combine::kUnion;
  const int64_t own = c.valid_self ? rho * c.rank_self : smaller ? far : 0;
  const int64_t other = c.valid_cross ? (1000 - rho) * c.rank_cross : smaller ? far : 0;
  return smaller ? std::min(own, other) : std::max(own, other);
}

// The slots of one row by the definition: ranks counted pair by pair, one sort at the end.
std::vector<int32_t> definition(const Problem& problem, int64_t row) {
  const SelectParams& p = problem.params;
  std::vector<int64_t> real;
  for (int64_t j = 0; j < p.keys; ++j) {
    if (problem.modality[row / p.score_heads * p.keys + j] >= 0) real.push_back(j);
  }
  const bool literal = p.k_self >= 0;
  const int64_t size = static_cast<int64_t>(real.size());
  std::vector<int64_t> kept = real;
  if (literal ? size >= p.budget : size > p.budget) {
    std::vector<Candidate> candidates = candidates_of(problem, row, p.recent, real);
    kept.assign(real.begin() + static_cast<int64_t>(candidates.size()), real.end());
    if (literal) {
      for (const Candidate& c : candidates) {
        const bool own = c.valid_self && c.rank_self <= p.k_self;
        const bool other = c.valid_cross && c.rank_cross <= p.k_cross;
        if (p.combine == Combine::kUnion ? own || other : own && other) kept.push_back(c.position);
      }
    } else {
      std::sort(candidates.begin(), candidates.end(), [&](const Candidate& a, const Candidate& b) {
        const int64_t key_a = key_of(a, p), key_b = key_of(b, p);
        return key_a < key_b || (key_a == key_b && tie_before(a, b));
      });
      for (int64_t c = 0; c < p.budget - p.recent; ++c) kept.push_back(candidates[c].position);
    }
  }
  std::sort(kept.begin(), kept.end());
  std::vector<int32_t> slots(p.budget - kept.size(), -1);
  slots.insert(slots.end(), kept.begin(), kept.end());
  return slots;
}

void expect_definition(Problem& problem) {
  problem.run();
  const SelectParams& p = problem.params;
  for (int64_t row = 0; row < p.batch * p.score_heads; ++row) {
    const std::vector<int32_t> want = definition(problem, row);
    const std::vector<int32_t> got(problem.indices.begin() + row * p.budget,
                                   problem.indices.begin() + (row + 1) * p.budget);
    ASSERT_EQ(got, want) << "row " << row << ", L " << p.keys << ", T " << p.budget << ", R " << p.recent
                         << ", rho " << p.rho_thousandths << ", k_self " << p.k_self;
    ASSERT_EQ(problem.lengths[row], p.budget - std::count(want.begin(), want.end(), -1));
  }
}

TEST_P(Select, MatchesTheDefinition) {
  uint32_t seed = 0;
  for (const int64_t keys : {1, 9, 64, 260}) {
    for (const int levels : {1, 2, 9, 200}) {
      for (const Combine combine : {Combine::kIntersection, Combine::kUnion}) {
        for (const int32_t rho : {0, 90, 500, 1000}) {
          for (const Pool pool : {Pool::kNone, Pool::kMax, Pool::kPast}) {
            Problem problem(dtype(), 2, 2, keys, std::min<int64_t>(keys, 1 + seed % 20));
            problem.fill(++seed, levels);
            SelectParams& p = problem.params;
            p.budget = 1 + keys * (1 + seed % 6) / 5;
            p.recent = std::min<int64_t>(p.budget, seed % 7);
            p.combine = combine;
            p.rho_thousandths = rho;
            p.pool = pool;
            p.pool_kernel = 1 + 2 * (seed % 4);
            p.causal = seed % 3 != 0;
            expect_definition(problem);
            if (HasFatalFailure()) return;
            p.k_self = (p.budget - p.recent) / 3;
            p.k_cross = p.budget - p.recent - p.k_self;
            expect_definition(problem);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(Select, CalibratedWeighsTheShares) {
  // Shares of self: .125 .25 .625 (sum 8), of cross: .5 .25 .25 (sum 4).
  Problem problem(dtype(), 1, 1, 3, 2);
  problem.query_modality = {0, 1};
  problem.params.causal = false;
  const double self[] = {1, 2, 5}, cross[] = {2, 1, 1};
  for (size_t i = 0; i < 3; ++i) {
    problem.self.set(i, self[i]);
    problem.cross.set(i, cross[i]);
  }
  problem.params.budget = 1;
  problem.params.combine = Combine::kCalibrated;
  for (const auto& [rho, best] : {std::pair{0, 2}, {400, 2}, {600, 2}, {800, 0}, {1000, 0}}) {
    problem.params.rho_thousandths = rho;
    problem.run();
    EXPECT_EQ(problem.indices[0], best) << "rho " << rho;
  }
  for (size_t i = 0; i < 3; ++i) problem.cross.set(i, 0);
  problem.params.rho_thousandths = 999;
  problem.run();
  EXPECT_EQ(problem.indices[0], 2);
}

TEST_P(Select, AverageCountsTheElementsPresent) {
  Problem problem(dtype(), 1, 1, 6, 1);
  problem.modality = {0, 0, 0, 1, 1, 1};
  const double self[] = {3, 3, 0, 8, 0, 0};  // averages 3, 2, 1.5, 4, 8/3, 0
  for (size_t i = 0; i < 6; ++i) problem.self.set(i, self[i]);
  SelectParams& p = problem.params;
  p.causal = false;
  p.rho_thousandths = 0;
  p.pool = Pool::kAvg;
  p.pool_kernel = 3;
  p.budget = 2;
  problem.query_modality = {0};  // the self list holds the text keys alone
  problem.run();
  EXPECT_EQ(problem.indices, (std::vector<int32_t>{0, 1}));
  problem.query_modality = {1};
  problem.run();
  EXPECT_EQ(problem.indices, (std::vector<int32_t>{3, 4}));
}

TEST_P(Select, PastTakesTheCandidatesBefore) {
  Problem problem(dtype(), 1, 1, 9, 1);
  problem.modality = {0, 0, 0, 0, 0, -1, 1, 1, 1};
  const double self[] = {1, 6, NAN, 0, 9, NAN, 1, 8, 0};  // with the two before: 1, 6, 6, 6, 9; 1, 8, 8
  for (size_t i = 0; i < 9; ++i) problem.self.set(i, self[i]);
  SelectParams& p = problem.params;
  p.causal = false;
  p.rho_thousandths = 0;
  p.pool = Pool::kPast;
  p.pool_kernel = 5;
  p.budget = 3;
  problem.query_modality = {0};  // the self list holds the text keys alone
  problem.run();
  EXPECT_EQ(problem.indices, (std::vector<int32_t>{1, 3, 4}));
  p.budget = 4;
  problem.run();
  EXPECT_EQ(problem.indices, (std::vector<int32_t>{1, 2, 3, 4}));
  p.budget = 2;
  problem.query_modality = {1};
  problem.run();
  EXPECT_EQ(problem.indices, (std::vector<int32_t>{7, 8}));
}

TEST_P(Select, SurvivesNaNAndInfinity) {
  for (const Combine combine : {Combine::kIntersection, Combine::kUnion, Combine::kCalibrated}) {
    for (const Pool pool : {Pool::kNone, Pool::kMax, Pool::kAvg, Pool::kPast}) {
      Problem problem(dtype(), 1, 1, 120, 4);
      problem.fill(5, 7);
      problem.modality.assign(120, 0);
      for (size_t i = 0; i < 120; i += 3) problem.self.set(i, i % 2 ? NAN : INFINITY);
      for (size_t i = 0; i < 120; i += 7) problem.cross.set(i, i % 2 ? NAN : -INFINITY);
      problem.params.budget = 60;
      problem.params.recent = 4;
      problem.params.combine = combine;
      problem.params.pool = pool;
      problem.run();
      EXPECT_EQ(problem.lengths[0], 60);
      EXPECT_TRUE(std::is_sorted(problem.indices.begin(), problem.indices.end()));
      EXPECT_EQ(std::adjacent_find(problem.indices.begin(), problem.indices.end()), problem.indices.end());
    }
  }
}

TEST_P(Select, EmptyProblems) {
  for (const auto& [batch, heads, keys] : {std::tuple{0, 2, 5}, {2, 0, 5}, {2, 3, 0}}) {
    Problem problem(dtype(), batch, heads, keys, std::min(keys, 2));
    problem.params.budget = 4;
    problem.run();
    EXPECT_EQ(problem.indices, std::vector<int32_t>(batch * heads * 4, -1));
    EXPECT_EQ(problem.lengths, std::vector<int32_t>(batch * heads, 0));
  }
}

TEST_P(Select, ThreadsDoNotChangeABit) {
  for (const Combine combine : {Combine::kIntersection, Combine::kUnion, Combine::kCalibrated}) {
    Problem problem(dtype(), 2, 20, 600, 16);
    problem.fill(3, 5000);
    problem.params.budget = 150;
    problem.params.recent = 16;
    problem.params.combine = combine;
    problem.params.pool = Pool::kAvg;
    problem.run();
    const std::vector<int32_t> one = problem.indices;
    problem.run(threads(3));
    EXPECT_EQ(problem.indices, one);
  }
}

CSP_INSTANTIATE(Select);

}  // namespace
}  // namespace csp::test
