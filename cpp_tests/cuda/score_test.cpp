#include "csp/score.h"

#include <algorithm>
#include <optional>

#include "csp/plan.h"
#include "support.h"

namespace csp::test {
namespace {

struct Problem {
  int64_t batch = 1, heads = 2, kv_heads = 2, window = 5, keys = 40, dim = 16;
  double n = 1.0, scale = 0.3, spread = 1.0;
  bool causal = true;
  Heads mode = Heads::kKv;
  bool with_lse = false;
  int64_t gap = 0;                 // unused elements between rows of query and key
  bool rows_before_heads = false;  // [B, O, H, D] in memory
  bool one_cache = false;          // the batch shares its keys: stride 0
  size_t offset = 0;               // bytes past an aligned address
  int padding = 0;                 // percent of padding among keys and of silent queries
  int modalities = 2;
  int run = 7;  // neighbours of one modality

  int64_t out_heads() const { return mode == Heads::kShared ? 1 : kv_heads; }
};

std::ostream& operator<<(std::ostream& out, const Problem& p) {
  return out << "B " << p.batch << " Hq " << p.heads << " Hkv " << p.kv_heads << " O " << p.window << " L "
             << p.keys << " D " << p.dim << " n " << p.n << " causal " << p.causal << " shared "
             << (p.mode == Heads::kShared) << " lse " << p.with_lse << " padding " << p.padding << " gap "
             << p.gap;
}

// The inputs of a problem, with NaN wherever nothing may look, and the truth.
class Inputs {
 public:
  Inputs(const Problem& problem, DType dtype, uint32_t seed)
      : p(problem),
        modality(static_cast<size_t>(p.batch * p.keys)),
        query_modality(static_cast<size_t>(p.batch * p.window)),
        dtype_(dtype),
        query(
            Buffer::random(dtype, static_cast<size_t>(p.batch * p.heads * p.window * row()), seed, p.spread)),
        key(Buffer::random(dtype, static_cast<size_t>(key_batches() * p.kv_heads * p.keys * row()), seed + 1,
                           p.spread)),
        lse(DType::kFloat32, static_cast<size_t>(p.batch * p.heads * p.window)) {
    std::mt19937 random(seed + 2);
    const auto draw = [&](std::vector<int8_t>& to) {
      int8_t last = 0;
      for (size_t i = 0; i < to.size(); ++i) {
        if (i % static_cast<size_t>(p.run) == 0)
          last = static_cast<int8_t>(random() % static_cast<unsigned>(p.modalities));
        to[i] = static_cast<int>(random() % 100) < p.padding ? int8_t{-1} : last;
      }
    };
    draw(modality);
    draw(query_modality);
    std::normal_distribution<double> normal(2.0, 2.0);
    for (size_t i = 0; i < lse.size(); ++i) lse.set(i, normal(random));
    hide();
  }

  ScoreParams params() const {
    ScoreParams q;
    q.dtype = dtype_;
    q.query_stride = strides(p.heads, p.window);
    q.key_stride = strides(p.kv_heads, p.keys);
    if (p.one_cache) q.key_stride.batch = 0;
    q.batch = p.batch;
    q.num_heads = p.heads;
    q.num_kv_heads = p.kv_heads;
    q.window = p.window;
    q.keys = p.keys;
    q.head_dim = p.dim;
    q.n = p.n;
    q.scale = p.scale;
    q.heads = p.mode;
    q.causal = p.causal;
    return q;
  }

  size_t outputs() const { return static_cast<size_t>(p.batch * p.out_heads() * p.keys); }

  // The float64 kernel over the same numbers.
  void truth(Buffer& self, Buffer& cross) const {
    const Buffer wide_query = widened(query), wide_key = widened(key), wide_lse = widened(lse);
    ScoreParams q = params();
    q.dtype = DType::kFloat64;
    q.query = wide_query.data();
    q.key = wide_key.data();
    q.lse = p.with_lse ? wide_lse.data() : nullptr;
    q.modality = modality.data();
    q.query_modality = query_modality.data();
    q.self = self.data();
    q.cross = cross.data();
    const Workspace workspace(score_cpu_workspace_bytes(q, 1));
    score_cpu(q, workspace.get());
  }

  struct Result {
    std::vector<float> self, cross;
    friend bool operator==(const Result& a, const Result& b) {
      const auto same = [](const std::vector<float>& x, const std::vector<float>& y) {
        return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size() * 4) == 0);
      };
      return same(a.self, b.self) && same(a.cross, b.cross);
    }
  };

  Result run(const CudaDevice& device, uint64_t seed) const {
    seed_threads(seed);
    const DeviceBuffer on_query = to_device("query", query, p.offset),
                       on_key = to_device("key", key, p.offset), on_lse = to_device("lse", lse),
                       on_modality = to_device("modality", modality),
                       on_query_modality = to_device("query_modality", query_modality),
                       self("self", outputs() * 4), cross("cross", outputs() * 4);
    ScoreParams q = params();
    q.lse = p.with_lse ? on_lse.data() : nullptr;
    const Plan plan = plan_score_cuda(q, device);
    q.query = on_query.data();
    q.key = on_key.data();
    q.modality = static_cast<const int8_t*>(on_modality.data());
    q.query_modality = static_cast<const int8_t*>(on_query_modality.data());
    q.self = self.data();
    q.cross = cross.data();
    const Launch launch(device, static_cast<size_t>(plan.workspace_bytes));
    const uint32_t before = launches();
    expect_ok(score_cuda(q, launch.context()));
    if (in_harness() && p.offset == 0) {
      EXPECT_EQ(launches() - before, plan.launches);
    }
    return {self.values<float>(), cross.values<float>()};
  }

  // Both columns sum positive terms, so their error is that of an exponent: of the float32 logits.
  void expect_matches(const Result& got, double extra = 0) const {
    Buffer self(DType::kFloat64, outputs()), cross(DType::kFloat64, outputs());
    truth(self, cross);
    const double tolerance = 2e-5 + extra;
    int shown = 0;
    const auto compare = [&](const char* name, const std::vector<float>& x, const Buffer& want) {
      ASSERT_EQ(x.size(), want.size());
      for (size_t i = 0; i < x.size() && shown < 4; ++i) {
        const double a = x[i], b = want.read(i);
        if (a == b || (std::isnan(a) && std::isnan(b)) || std::abs(a - b) <= tolerance * std::abs(b) + 1e-35)
          continue;
        ADD_FAILURE() << name << " " << i << " is " << a << ", not " << b;
        ++shown;
      }
    };
    compare("self", got.self, self);
    compare("cross", got.cross, cross);
  }

  Problem p;
  std::vector<int8_t> modality, query_modality;

  int64_t query_at(int64_t b, int64_t h, int64_t i) const { return at(strides(p.heads, p.window), b, h, i); }
  int64_t key_at(int64_t b, int64_t h, int64_t j) const {
    return at(strides(p.kv_heads, p.keys), p.one_cache ? 0 : b, h, j);
  }

  // What is masked may hold anything, and so may the gaps between rows.
  void hide() {
    if (row() == 0) return;
    for (size_t r = 0; r < query.size() / static_cast<size_t>(row()); ++r)
      hide_gap(query, static_cast<int64_t>(r) * row());
    for (size_t r = 0; r < key.size() / static_cast<size_t>(row()); ++r)
      hide_gap(key, static_cast<int64_t>(r) * row());
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = 0; i < p.window; ++i) {
        if (query_modality[static_cast<size_t>(b * p.window + i)] >= 0) continue;
        for (int64_t h = 0; h < p.heads; ++h) fill(query, query_at(b, h, i), NAN);
      }
      for (int64_t j = 0; j < p.keys && !p.one_cache; ++j) {
        if (modality[static_cast<size_t>(b * p.keys + j)] >= 0) continue;
        for (int64_t h = 0; h < p.kv_heads; ++h) fill(key, key_at(b, h, j), NAN);
      }
    }
  }

  void fill(Buffer& buffer, int64_t at, double value) const {
    for (int64_t d = 0; d < p.dim; ++d) buffer.set(static_cast<size_t>(at + d), value);
  }

 private:
  int64_t row() const { return p.dim + p.gap; }
  int64_t key_batches() const { return p.one_cache ? std::min<int64_t>(p.batch, 1) : p.batch; }
  Strides strides(int64_t heads, int64_t rows) const {
    if (p.rows_before_heads) return {rows * heads * row(), row(), heads * row()};
    return {heads * rows * row(), rows * row(), row()};
  }
  static int64_t at(const Strides& s, int64_t b, int64_t h, int64_t r) {
    return b * s.batch + h * s.head + r * s.row;
  }
  void hide_gap(Buffer& buffer, int64_t at) const {
    for (int64_t d = p.dim; d < row(); ++d) buffer.set(static_cast<size_t>(at + d), NAN);
  }

  DType dtype_;

 public:
  Buffer query, key, lse;
};

uint32_t fresh_seed() {
  static uint32_t seed = 0;
  return seed += 10;
}

void check(const Problem& problem, DType dtype, const CudaDevice& device, double extra = 0) {
  SCOPED_TRACE(testing::Message() << problem << " on sm_" << device.capability);
  const uint32_t seed = fresh_seed();
  const Inputs inputs(problem, dtype, seed);
  inputs.expect_matches(inputs.run(device, seed), extra);
}

class ScoreCuda : public PerCudaDType {
 protected:
  // float32 takes one path on all of them; what float16 does without tensor cores, bfloat16 does too.
  static std::vector<CudaDevice> devices() {
    std::vector<CudaDevice> all = test::devices();
    const size_t most = GetParam() == DType::kFloat32 ? 1 : GetParam() == DType::kBFloat16 ? 2 : all.size();
    while (all.size() > most) all.erase(all.begin());
    return all;
  }
};

TEST_P(ScoreCuda, Windows) {
  for (const CudaDevice& device : devices()) {
    for (const int64_t window : {1, 7, 32, 33, 64, 130}) {
      Problem p;
      p.window = window;
      p.keys = window + 171;
      p.heads = p.kv_heads = 1;
      p.causal = window != 33;
      p.n = window % 2 == 0 ? 0 : 1;
      check(p, GetParam(), device);
    }
  }
}

TEST_P(ScoreCuda, HeadDims) {
  for (const CudaDevice& device : devices()) {
    for (const int64_t dim : {1, 8, 33, 64, 72, 96, 128, 200}) {
      Problem p;
      p.dim = dim;
      p.keys = 67;
      p.window = 18;
      p.heads = p.kv_heads = 1;
      p.scale = 0.1;
      check(p, GetParam(), device);
      // Too many rows for a cluster.
      p.with_lse = true;
      if (device.capability >= 90) check(p, GetParam(), device);
    }
  }
}

TEST_P(ScoreCuda, GroupsPaddingAndModalities) {
  uint32_t at = 0;
  for (const CudaDevice& device : devices()) {
    for (const Heads mode : {Heads::kKv, Heads::kShared}) {
      for (const int padding : {0, 30, 97, 100}) {
        for (const bool with_lse : {false, true}) {
          Problem p;
          p.batch = 1 + at % 2;
          p.heads = at % 4 < 2 ? 7 : 14;
          p.kv_heads = p.heads / 7;
          p.window = at % 3 == 0 ? 10 : 7;  // 49 rows: a cluster's; 70: not
          p.keys = 100;
          p.mode = mode;
          p.padding = padding;
          p.with_lse = with_lse;
          p.modalities = at % 3 == 0 ? 100 : 3;
          p.run = at % 5 == 0 ? 1 : 20;
          p.causal = at % 4 != 0;
          p.n = at % 3 == 2 ? 1e6 : at % 3;
          check(p, GetParam(), device);
          ++at;
        }
      }
    }
  }
}

TEST_P(ScoreCuda, PaddingInRuns) {
  for (const CudaDevice& device : devices()) {
    for (const int64_t where : {0, 1, 2}) {
      SCOPED_TRACE(testing::Message() << "padding at " << where << " on sm_" << device.capability);
      Problem p;
      p.keys = 400;
      p.heads = p.kv_heads = 1;
      p.window = 20;
      Inputs inputs(p, GetParam(), fresh_seed());
      const int64_t begin = where * 120;  // left, in the middle, right: whole tiles, and the window's own
      for (int64_t j = begin; j < begin + 160; ++j) inputs.modality[static_cast<size_t>(j)] = -1;
      for (int64_t i = 0; i < 6; ++i) inputs.query_modality[static_cast<size_t>(i)] = -1;
      inputs.hide();
      inputs.expect_matches(inputs.run(device, 3));
    }
  }
}

TEST_P(ScoreCuda, TheWindowMayBeTheWholePrompt) {
  for (const CudaDevice& device : devices()) {
    Problem p;
    p.window = p.keys = 200;
    p.heads = p.kv_heads = 1;
    check(p, GetParam(), device);
    p.with_lse = true;
    check(p, GetParam(), device);
  }
}

TEST_P(ScoreCuda, ManyRows) {
  for (const CudaDevice& device : devices()) {
    Problem p;
    p.heads = 9;
    p.kv_heads = 1;
    p.window = 130;  // more rows than have their constants in shared memory at once
    p.keys = 140;
    p.modalities = 3;
    p.run = 40;
    check(p, GetParam(), device);
  }
}

TEST_P(ScoreCuda, ExtremeLogits) {
  for (const CudaDevice& device : devices()) {
    for (const bool wide : {false, true}) {
      for (const double n : {0.0, 1.0}) {
        for (const double scale : {30.0, -3.0}) {
          Problem p;
          p.keys = 131;
          p.dim = 8;
          p.window = wide ? 40 : 9;
          p.n = n;
          p.scale = scale;
          p.spread = 2;
          p.heads = p.kv_heads = 2;
          p.mode = wide ? Heads::kShared : Heads::kKv;
          // Logits reach about scale * 4 * 8 in units of 2^-23 of themselves.
          check(p, GetParam(), device, std::abs(scale) * 100 * 0x1p-22);
        }
      }
    }
  }
}

TEST_P(ScoreCuda, NanAndInfinity) {
  for (const CudaDevice& device : devices()) {
    for (const bool with_lse : {false, true}) {
      for (const double value : {NAN, INFINITY, -INFINITY}) {
        SCOPED_TRACE(testing::Message() << value << " lse " << with_lse << " on sm_" << device.capability);
        Problem p;
        p.keys = 150;
        p.window = 40;
        p.heads = 4;
        p.run = 20;
        p.with_lse = with_lse;
        p.padding = 10;
        Inputs inputs(p, GetParam(), fresh_seed());
        // In a key that all see, one that few see, one that is padding, a query that is silent, and one not.
        inputs.modality[30] = inputs.modality[140] = 1;
        inputs.modality[31] = inputs.query_modality[3] = -1;
        inputs.query_modality[20] = 0;
        inputs.hide();
        for (const int64_t j : {31, 140}) inputs.key.set(static_cast<size_t>(inputs.key_at(0, 0, j)), value);
        inputs.key.set(static_cast<size_t>(inputs.key_at(0, 1, 30)), value);
        inputs.query.set(static_cast<size_t>(inputs.query_at(0, 0, 3)), value);
        inputs.query.set(static_cast<size_t>(inputs.query_at(0, 3, 20)), value);
        inputs.expect_matches(inputs.run(device, 5));
      }
    }
  }
}

TEST_P(ScoreCuda, AnLseMayBeAnything) {
  for (const CudaDevice& device : devices()) {
    SCOPED_TRACE(testing::Message() << "on sm_" << device.capability);
    Problem p;
    p.with_lse = true;
    p.window = 24;
    Inputs inputs(p, GetParam(), fresh_seed());
    const double values[] = {-INFINITY, INFINITY, -80, 80, 0};
    for (size_t i = 0; i < inputs.lse.size(); ++i)
      inputs.lse.set(i, i < 24 ? values[i % 5] : i == 30 ? NAN : 1);
    inputs.expect_matches(inputs.run(device, 5));
  }
}

TEST_P(ScoreCuda, StridesAndAlignment) {
  for (const CudaDevice& device : devices()) {
    Problem p;
    p.batch = 2;
    p.heads = 4;
    p.keys = 100;
    p.window = 15;
    p.rows_before_heads = true;
    check(p, GetParam(), device);
    p.one_cache = true;
    check(p, GetParam(), device);
    p.gap = 8;
    p.padding = 20;
    p.one_cache = false;
    check(p, GetParam(), device);
    p.gap = 3;
    check(p, GetParam(), device);
    p.gap = 0;
    p.offset = 4;
    check(p, GetParam(), device);
  }
}

TEST_P(ScoreCuda, RandomProblems) {
  std::mt19937 random(17);
  const auto below = [&](int64_t limit) {
    return static_cast<int64_t>(random() % static_cast<unsigned>(limit));
  };
  for (int i = 0; i < 12; ++i) {
    Problem p;
    p.batch = 1 + below(3);
    p.kv_heads = 1 + below(3);
    p.heads = p.kv_heads * (1 + below(4));
    p.keys = 1 + below(260);
    p.window = 1 + below(std::min<int64_t>(p.keys, 40));
    p.dim = below(3) == 0 ? 1 + below(50) : 8 * (1 + below(6));
    p.gap = below(2) * 8;
    p.n = static_cast<double>(below(3)) / 2;
    p.causal = below(4) > 0;
    p.mode = below(2) == 0 ? Heads::kKv : Heads::kShared;
    p.with_lse = below(3) == 0;
    p.padding = static_cast<int>(below(2) * below(60));
    p.modalities = 1 + static_cast<int>(below(4));
    p.run = 1 + static_cast<int>(below(50));
    check(p, GetParam(), devices()[static_cast<size_t>(i) % devices().size()]);
  }
}

TEST_P(ScoreCuda, TheOrderOfThreadsDoesNotChangeABit) {
  for (const CudaDevice& device : devices()) {
    for (const int64_t window : {12, 50}) {
      Problem p;
      p.heads = 4;
      p.window = window;
      p.keys = 130;
      p.mode = Heads::kShared;
      p.padding = 10;
      const Inputs inputs(p, GetParam(), fresh_seed());
      const Inputs::Result one = inputs.run(device, 1);
      for (const uint64_t seed : {2, 3}) EXPECT_TRUE(inputs.run(device, seed) == one);
    }
  }
}

TEST_P(ScoreCuda, SmallDevices) {
  // Heads a few at a time where the cache is small, narrow tiles where shared memory is.
  CudaDevice small_cache = devices()[0], small_shared = devices()[0];
  if (in_harness()) small_cache = small_shared = test::devices()[1];
  small_cache.l2_bytes = 10 << 10;
  small_shared.shared_bytes = 99 << 10;
  Problem p;
  p.batch = 2;
  p.heads = 6;
  p.kv_heads = 3;
  p.keys = 100;
  p.window = 9;
  check(p, GetParam(), small_cache);
  p.mode = Heads::kShared;
  check(p, GetParam(), small_cache);
  p.dim = 136;
  p.batch = 1;
  check(p, GetParam(), small_shared);
}

TEST_P(ScoreCuda, OneMultiprocessor) {
  // Long ways for each block: every stage of shared memory is used again and again.
  CudaDevice device = test::devices().back();
  if (in_harness()) device.multiprocessors = 1;
  for (const int64_t window : {8, 20, 40, 70}) {
    Problem p;
    p.heads = p.kv_heads = 1;
    p.keys = 1000;
    p.window = window;
    p.padding = 2;
    check(p, GetParam(), device);
  }
}

TEST_P(ScoreCuda, EmptyProblems) {
  for (const CudaDevice& device : devices()) {
    for (const Heads mode : {Heads::kKv, Heads::kShared}) {
      Problem p;
      p.mode = mode;
      p.window = 0;
      check(p, GetParam(), device);
      p = Problem();
      p.mode = mode;
      p.batch = 0;
      check(p, GetParam(), device);
      p = Problem();
      p.mode = mode;
      p.window = p.keys = 0;
      check(p, GetParam(), device);
      p = Problem();
      p.mode = mode;
      p.heads = p.kv_heads = 0;
      check(p, GetParam(), device);
      p = Problem();
      p.mode = mode;
      p.dim = 0;
      check(p, GetParam(), device);
    }
  }
}

TEST(ScoreCudaLauncher, RefusesFloat64AndATooSmallWorkspace) {
  ScoreParams params;
  params.dtype = DType::kFloat64;
  EXPECT_STREQ(score_cuda(params, Launch(devices()[0], 0).context()).reason,
               "float64 is not supported on CUDA");
  params.dtype = DType::kFloat32;
  params.batch = params.num_heads = params.num_kv_heads = params.window = params.keys = params.head_dim = 1;
  ASSERT_GT(score_cuda_workspace_bytes(params, devices()[0]), 0u);
  const CudaStatus status = score_cuda(params, Launch(devices()[0], 0).context());
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(status.kernel, nullptr);
}

ScoreParams llava(int64_t batch, int64_t window) {
  ScoreParams params;
  params.dtype = DType::kBFloat16;
  params.batch = batch;
  params.num_heads = params.num_kv_heads = 32;
  params.window = window;
  params.keys = 4096;
  params.head_dim = 128;
  params.query_stride = {32 * window * 128, window * 128, 128};
  params.key_stride = {32 * 4096 * 128, 4096 * 128, 128};
  return params;
}

TEST(ScoreCudaPlan, SmallWindowsReadTheKeysOnce) {
  const CudaDevice h200;
  for (const int64_t batch : {1, 8, 24}) EXPECT_EQ(plan_score_cuda(llava(batch, 32), h200).launches, 1);
  // Wider windows read them twice, the second time from the cache or behind the arithmetic.
  EXPECT_EQ(plan_score_cuda(llava(1, 410), h200).launches, 2);
  EXPECT_EQ(plan_score_cuda(llava(24, 410), h200).launches, 2);
  CudaDevice a100{108, 80, 163 << 10, 40 << 20};
  EXPECT_EQ(plan_score_cuda(llava(1, 32), a100).launches, 2);
  EXPECT_EQ(plan_score_cuda(llava(8, 32), a100).launches, 2 * 13);
  // The heads of one launch are the y of its grid.
  EXPECT_EQ(plan_score_cuda(llava(65536 / 32, 32), h200).launches, 2);
}

TEST(ScoreCudaPlan, TheMatrixIsNeverHeld) {
  for (const int64_t window : {32, 410, 4096}) {
    ScoreParams params = llava(2, window);
    const int64_t rows = 2 * 32 * window;
    EXPECT_LE(plan_score_cuda(params, {}).workspace_bytes, rows * 32 * 8);
    params.heads = Heads::kShared;
    EXPECT_LE(plan_score_cuda(params, {}).workspace_bytes, rows * 32 * 8 + 2 * 32 * 2 * 4096 * 4);
  }
}

CSP_INSTANTIATE_CUDA(ScoreCuda);

}  // namespace
}  // namespace csp::test
