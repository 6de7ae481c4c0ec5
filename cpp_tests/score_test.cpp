#include "csp/score.h"

#include "support.h"

namespace csp::test {
namespace {

class Score : public PerIsaAndDType {};

// A problem, its inputs and its result.
struct Problem {
  int64_t batch = 1, heads = 2, kv_heads = 2, window = 5, keys = 30, dim = 8;
  double n = 1.0;
  bool causal = true;
  Heads mode = Heads::kKv;
  bool with_lse = false;
  int64_t gap = 0;  // unused elements between rows of query and key
  int padding = 0;  // percent of padding among keys and of silent queries in the window
  int modalities = 2;

  int64_t out_heads() const { return mode == Heads::kShared ? 1 : kv_heads; }
};

struct Result {
  Buffer self, cross;
};

class Inputs {
 public:
  Inputs(const Problem& problem, DType dtype, uint32_t seed)
      : p_(problem),
        dtype_(dtype),
        stride_(p_.dim + p_.gap),
        query_(Buffer::random(dtype, p_.batch * p_.heads * p_.window * stride_, seed)),
        key_(Buffer::random(dtype, p_.batch * p_.kv_heads * p_.keys * stride_, seed + 1)),
        lse_(accumulate_dtype(dtype), p_.batch * p_.heads * p_.window),
        modality_(p_.batch * p_.keys),
        query_modality_(p_.batch * p_.window) {
    std::mt19937 random(seed + 2);
    const auto draw = [&] {
      const bool padding = static_cast<int>(random() % 100) < p_.padding;
      return static_cast<int8_t>(padding ? -1 : random() % p_.modalities);
    };
    for (auto& m : modality_) m = draw();
    for (auto& m : query_modality_) m = draw();
    hide_with_nan(key_, p_.kv_heads, p_.keys, modality_);
    hide_with_nan(query_, p_.heads, p_.window, query_modality_);
    for (int64_t row = 0; row < p_.batch * p_.heads * p_.window; ++row) lse_.set(row, row_lse(row));
  }

  Result run(const Parallel& parallel = {}) const {
    const size_t size = p_.batch * p_.out_heads() * p_.keys;
    Result result{Buffer(accumulate_dtype(dtype_), size), Buffer(accumulate_dtype(dtype_), size)};
    ScoreParams params;
    params.dtype = dtype_;
    params.query = query_.data();
    params.query_stride = {p_.heads * p_.window * stride_, p_.window * stride_, stride_};
    params.key = key_.data();
    params.key_stride = {p_.kv_heads * p_.keys * stride_, p_.keys * stride_, stride_};
    params.modality = modality_.data();
    params.query_modality = query_modality_.data();
    params.lse = p_.with_lse ? lse_.data() : nullptr;
    params.self = result.self.data();
    params.cross = result.cross.data();
    params.batch = p_.batch;
    params.num_heads = p_.heads;
    params.num_kv_heads = p_.kv_heads;
    params.window = p_.window;
    params.keys = p_.keys;
    params.head_dim = p_.dim;
    params.n = p_.n;
    params.scale = kScale;
    params.heads = p_.mode;
    params.causal = p_.causal;
    const Workspace workspace(score_cpu_workspace_bytes(params, parallel.num_threads));
    score_cpu(params, workspace.get(), parallel);
    return result;
  }

  // The formula in double, entry by entry.
  void expect_matches(const Result& result) const {
    const size_t size = result.self.size();
    std::vector<double> want[2] = {std::vector<double>(size), std::vector<double>(size)};
    const int64_t group = p_.heads / p_.kv_heads;
    const double mean = 1.0 / static_cast<double>(p_.mode == Heads::kShared ? p_.heads : group);
    for (int64_t row = 0; row < p_.batch * p_.heads * p_.window; ++row) {
      const int64_t b = row / p_.window / p_.heads, head = row / p_.window % p_.heads, i = row % p_.window;
      const int8_t own = query_modality_[b * p_.window + i];
      const double lse = p_.with_lse ? lse_[row] : row_lse(row);
      if (own < 0 || lse == -INFINITY) continue;
      const int64_t out = p_.mode == Heads::kShared ? b : b * p_.kv_heads + head / group;
      for (int64_t j = 0; j < p_.keys; ++j) {
        if (!sees(b, i, j)) continue;
        const double weight = std::exp(logit(row, j) - lse) / (1 + p_.n * std::exp(-lse));
        want[own == modality_[b * p_.keys + j] ? 0 : 1][out * p_.keys + j] += weight * mean;
      }
    }
    const double tolerance = dtype_ == DType::kFloat64 ? 1e-12 : 1e-5;
    for (size_t j = 0; j < size; ++j) {
      ASSERT_NEAR(result.self.read(j), want[0][j], tolerance * want[0][j]) << "self " << j;
      ASSERT_NEAR(result.cross.read(j), want[1][j], tolerance * want[1][j]) << "cross " << j;
    }
  }

 private:
  static constexpr double kScale = 0.3;

  bool sees(int64_t b, int64_t i, int64_t j) const {
    return modality_[b * p_.keys + j] >= 0 && (!p_.causal || j <= p_.keys - p_.window + i);
  }

  double logit(int64_t row, int64_t j) const {
    const int64_t head = row / p_.window;
    const int64_t kv_row = head / (p_.heads / p_.kv_heads) * p_.keys + j;
    double sum = 0;
    for (int64_t d = 0; d < p_.dim; ++d) sum += query_[row * stride_ + d] * key_[kv_row * stride_ + d];
    return sum * kScale;
  }

  double row_lse(int64_t row) const {
    double sum = 0;
    for (int64_t j = 0; j < p_.keys; ++j) {
      if (sees(row / p_.window / p_.heads, row % p_.window, j)) sum += std::exp(logit(row, j));
    }
    return std::log(sum);
  }

  // What is masked may hold anything, and so may the gaps between rows.
  void hide_with_nan(Buffer& buffer, int64_t heads, int64_t rows, const std::vector<int8_t>& modality) {
    for (int64_t row = 0; row < p_.batch * heads * rows; ++row) {
      const bool hidden = modality[row / rows / heads * rows + row % rows] < 0;
      for (int64_t d = hidden ? 0 : p_.dim; d < stride_; ++d) buffer.set(row * stride_ + d, NAN);
    }
  }

  Problem p_;
  DType dtype_;
  int64_t stride_;
  Buffer query_, key_, lse_;
  std::vector<int8_t> modality_, query_modality_;
};

void check(const Problem& problem, DType dtype, uint32_t seed) {
  const Inputs inputs(problem, dtype, seed);
  inputs.expect_matches(inputs.run());
}

TEST_P(Score, MatchesTheFormula) {
  uint32_t seed = 1;
  for (const int64_t dim : {1, 7, 16, 33, 64}) {
    for (const int64_t keys : {1, 11, 96, 97, 205}) {
      for (const bool causal : {true, false}) {
        Problem p;
        p.dim = dim;
        p.keys = keys;
        p.window = keys < 21 ? keys : 21;
        p.causal = causal;
        p.gap = seed % 3;
        p.n = seed % 2;
        SCOPED_TRACE(testing::Message() << "dim " << dim << " keys " << keys << " causal " << causal);
        check(p, dtype(), ++seed);
      }
    }
  }
}

TEST_P(Score, GroupsHeadsPaddingAndModalities) {
  uint32_t seed = 100;
  for (const Heads mode : {Heads::kKv, Heads::kShared}) {
    for (const int padding : {0, 30, 95, 100}) {
      for (const bool with_lse : {false, true}) {
        Problem p;
        p.batch = 2;
        p.heads = 12;
        p.kv_heads = 3;
        p.window = 19;
        p.keys = 150;
        p.mode = mode;
        p.padding = padding;
        p.with_lse = with_lse;
        p.modalities = seed % 2 ? 100 : 3;
        p.n = seed % 3;
        SCOPED_TRACE(testing::Message() << "padding " << padding << " lse " << with_lse);
        check(p, dtype(), ++seed);
      }
    }
  }
}

TEST_P(Score, TheWindowMayBeTheWholePrompt) {
  Problem p;
  p.window = p.keys = 110;
  p.heads = 4;
  check(p, dtype(), 5);
  p.with_lse = true;
  check(p, dtype(), 6);
}

TEST_P(Score, FarApartRowsAreCopiedTogether) {
  Problem p;
  p.gap = 2000;
  p.dim = 32;
  p.keys = 100;
  check(p, dtype(), 7);
}

TEST_P(Score, ThreadsDoNotChangeABit) {
  for (const Heads mode : {Heads::kKv, Heads::kShared}) {
    Problem p;
    p.heads = 14;
    p.window = 40;
    p.keys = 400;
    p.mode = mode;
    p.padding = 10;
    const Inputs inputs(p, dtype(), 8);
    const Result one = inputs.run();
    for (const int count : {2, 3, 100}) {
      const Result many = inputs.run(threads(count));
      EXPECT_EQ(one.self.bytes(), many.self.bytes());
      EXPECT_EQ(one.cross.bytes(), many.cross.bytes());
    }
  }
}

TEST_P(Score, EmptyProblems) {
  Problem p;
  p.window = 0;
  check(p, dtype(), 9);
  p = Problem();
  p.batch = 0;
  check(p, dtype(), 10);
  p = Problem();
  p.window = p.keys = 0;
  check(p, dtype(), 11);
  p = Problem();
  p.dim = 0;
  check(p, dtype(), 12);
}

TEST_P(Score, TheTileIsAllThatIsHeld) {
  ScoreParams params;
  params.dtype = dtype();
  params.batch = 1;
  params.num_heads = params.num_kv_heads = 64;
  params.window = 512;
  params.keys = 4096;
  params.head_dim = 128;
  const size_t tile = 16 * params.keys * 4;
  EXPECT_LT(score_cpu_workspace_bytes(params, 1), 2 * tile);
  EXPECT_LT(score_cpu_workspace_bytes(params, 8), 8 * 2 * tile);
}

CSP_INSTANTIATE(Score);

}  // namespace
}  // namespace csp::test
