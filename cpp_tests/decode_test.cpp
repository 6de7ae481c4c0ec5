#include "csp/decode.h"

#include "support.h"

namespace csp::test {
namespace {

class Decode : public PerIsaAndDType {};

struct Problem {
  int64_t batch = 1, heads = 1, group = 1, queries = 1, capacity = 1, dim = 1;
  double n = 1.0;
  int32_t end = -1;                 // -1: not given
  std::vector<int32_t> start = {};  // [B, Hkv]; empty: not given
  int64_t gap = 0;                  // elements between the rows of key and value

  int64_t first(int64_t b, int64_t h) const { return start.empty() ? 0 : start[b * heads + h]; }
  int64_t last() const { return end < 0 ? capacity : end; }
  int64_t rows() const { return batch * heads * group * queries; }
  int64_t slot(int64_t b, int64_t h, int64_t s) const {
    return ((b * heads + h) * capacity + s) * (dim + gap);
  }
};

struct Result {
  Buffer out;
  Buffer lse;
};

// Query, key and value; whatever no query may see is nan or inf.
struct Inputs {
  Inputs(const Problem& p, DType dtype, uint32_t seed)
      : query(Buffer::random(dtype, p.rows() * p.dim, seed)),
        key(Buffer::random(dtype, p.batch * p.heads * p.capacity * (p.dim + p.gap), seed + 1)),
        value(Buffer::random(dtype, key.size(), seed + 2)) {
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t h = 0; h < p.heads; ++h) {
        for (int64_t s = 0; s < p.capacity; ++s) {
          if (s >= p.first(b, h) && s < p.last()) continue;
          for (int64_t d = 0; d < p.dim; ++d) {
            key.set(p.slot(b, h, s) + d, s % 2 == 0 ? NAN : INFINITY);
            value.set(p.slot(b, h, s) + d, s % 3 == 0 ? -INFINITY : NAN);
          }
        }
      }
    }
  }
  Buffer query, key, value;
};

Result run(const Problem& p, DType dtype, const Inputs& in, const Parallel& parallel = {}) {
  Result result{Buffer(dtype, p.rows() * p.dim), Buffer(accumulate_dtype(dtype), p.rows())};
  DecodeParams params;
  params.dtype = dtype;
  params.query = in.query.data();
  params.query_stride = {p.heads * p.group * p.queries * p.dim, p.queries * p.dim, p.dim};
  params.key = in.key.data();
  params.value = in.value.data();
  params.key_stride = {p.heads * p.capacity * (p.dim + p.gap), p.capacity * (p.dim + p.gap), p.dim + p.gap};
  params.value_stride = params.key_stride;
  params.start = p.start.empty() ? nullptr : p.start.data();
  params.start_batch = p.heads;
  params.start_head = 1;
  params.end = p.end < 0 ? nullptr : &p.end;
  params.out = result.out.data();
  params.lse = result.lse.data();
  params.batch = p.batch;
  params.num_heads = p.heads * p.group;
  params.num_kv_heads = p.heads;
  params.queries = p.queries;
  params.capacity = p.capacity;
  params.head_dim = p.dim;
  params.n = p.n;
  params.scale = 1 / std::sqrt(static_cast<double>(p.dim));
  const Workspace workspace(decode_cpu_workspace_bytes(params, parallel.num_threads));
  decode_cpu(params, workspace.get(), parallel);
  return result;
}

void expect_matches(const Problem& p, DType dtype, uint32_t seed) {
  const Inputs in(p, dtype, seed);
  const Result got = run(p, dtype, in, threads(3));
  std::vector<double> weights;
  for (int64_t row = 0; row < p.rows(); ++row) {
    const int64_t i = row % p.queries, h = row / p.queries / p.group % p.heads,
                  b = row / (p.queries * p.group * p.heads);
    const int64_t first = p.first(b, h), last = p.last() - p.queries + 1 + i;
    weights.assign(p.capacity, 0.0);
    double sum = 0;
    for (int64_t s = first; s < last; ++s) {
      double dot = 0;
      for (int64_t d = 0; d < p.dim; ++d) dot += in.query[row * p.dim + d] * in.key[p.slot(b, h, s) + d];
      weights[s] = std::exp(dot / std::sqrt(static_cast<double>(p.dim)));
      sum += weights[s];
    }
    SCOPED_TRACE("B " + std::to_string(p.batch) + " Hkv " + std::to_string(p.heads) + " group " +
                 std::to_string(p.group) + " Q " + std::to_string(p.queries) + " C " +
                 std::to_string(p.capacity) + " D " + std::to_string(p.dim) + " row " + std::to_string(row));
    const double lse_rounding = dtype == DType::kFloat64 ? 1e-13 : 1e-5;
    if (sum == 0) {
      EXPECT_EQ(got.lse.read(row), -INFINITY);
    } else {
      EXPECT_NEAR(got.lse.read(row), std::log(sum), lse_rounding * std::max(1.0, std::log(sum)));
    }
    for (int64_t d = 0; d < p.dim; ++d) {
      double want = 0;
      for (int64_t s = first; s < last; ++s) want += weights[s] * in.value[p.slot(b, h, s) + d];
      want = sum == 0 ? 0 : want / (sum + p.n);
      const double accumulated = dtype == DType::kFloat64 ? 1e-14 : 3e-6;
      ASSERT_NEAR(got.out.read(row * p.dim + d), want, rounding(dtype) * std::abs(want) + accumulated) << d;
    }
  }
}

TEST_P(Decode, MatchesTheFormula) {
  uint32_t seed = 1;
  for (const int64_t dim : {1, 3, 5, 16, 17, 40, 72, 128}) {
    for (const int64_t capacity : {1, 15, 64, 65, 300}) {
      Problem p{2, 2, 1, 1, capacity, dim};
      p.group = seed % 3 + 1;
      p.queries = seed * 7 % 8 + 1;
      p.n = seed % 2;
      expect_matches(p, dtype(), ++seed);
    }
  }
}

TEST_P(Decode, EveryNumberOfRows) {
  for (int64_t group = 1; group <= 9; ++group) {
    for (const int64_t queries : {1, 2, 3}) expect_matches({1, 1, group, queries, 37, 33}, dtype(), group);
  }
}

TEST_P(Decode, SlotsOutsideTheRangeNeverLeak) {
  for (const int32_t end : {0, 1, 2, 64, 100, 128, 590}) {
    Problem p{2, 2, 2, 3, 590, 32, 1.0, end, {0, 33, 64, 590}};
    p.gap = 5;
    expect_matches(p, dtype(), static_cast<uint32_t>(end));
  }
}

TEST_P(Decode, TheNewestSlotDoesNotSpoilTheOlderQueries) {
  const Problem p{1, 1, 2, 4, 70, 20};
  Inputs in(p, dtype(), 5);
  const Result clean = run(p, dtype(), in);
  for (int64_t d = 0; d < p.dim; ++d) in.key.set(69 * p.dim + d, NAN);
  for (int64_t d = 0; d < p.dim; ++d) in.value.set(69 * p.dim + d, NAN);
  const Result spoilt = run(p, dtype(), in);
  for (int64_t row = 0; row < p.rows(); ++row) {
    for (int64_t d = 0; d < p.dim; ++d) {
      const double x = spoilt.out.read(row * p.dim + d);
      if (row % p.queries == p.queries - 1) {
        EXPECT_TRUE(std::isnan(x)) << row;
      } else {
        EXPECT_EQ(x, clean.out.read(row * p.dim + d)) << row;
      }
    }
  }
}

TEST_P(Decode, AVisibleNanIsNotSwallowed) {
  for (const int64_t slot : {0, 300, 599}) {
    const Problem p{1, 1, 1, 1, 600, 24};
    Inputs in(p, dtype(), 6);
    in.key.set(slot * p.dim, NAN);
    const Result got = run(p, dtype(), in);
    EXPECT_TRUE(std::isnan(got.lse.read(0))) << slot;
    EXPECT_TRUE(std::isnan(got.out.read(0))) << slot;
  }
}

TEST_P(Decode, HugeLogitsNeitherOverflowNorVanish) {
  for (const double sign : {1.0, -1.0}) {
    Problem p{1, 1, 1, 1, 300, 4};
    Inputs in(p, dtype(), 7);
    for (int64_t d = 0; d < p.dim; ++d) in.query.set(d, 200);
    for (int64_t i = 0; i < p.capacity * p.dim; ++i) in.key.set(i, sign * 100);
    const Result got = run(p, dtype(), in);
    EXPECT_NEAR(got.lse.read(0), sign * 40000 + std::log(300), 0.01);
    double mean = 0;
    for (int64_t s = 0; s < p.capacity; ++s) mean += in.value[s * p.dim] / p.capacity;
    const double want = sign > 0 ? mean : 0;
    EXPECT_NEAR(got.out.read(0), want, rounding(dtype()) * std::abs(want) + 1e-6);
  }
}

// One key with an infinite element that every query meets with a negative one: its weight is zero, also where
// the last vector of a row overlaps the one before.
TEST_P(Decode, AKeyOfMinusInfinityWeighsNothing) {
  for (const int64_t dim : {3, 17, 20, 33, 72}) {
    const Problem p{1, 1, 2, 1, 5, dim};
    Inputs in(p, dtype(), 3);
    for (int64_t row = 0; row < 2; ++row) in.query.set(row * dim + dim - 2, -1);
    in.key.set(p.slot(0, 0, 1) + dim - 2, INFINITY);
    const Result got = run(p, dtype(), in);
    in.value.set(p.slot(0, 0, 1), 100);
    const Result other = run(p, dtype(), in);
    for (int64_t i = 0; i < 2 * dim; ++i) EXPECT_TRUE(std::isfinite(got.out.read(i))) << "dim " << dim;
    EXPECT_EQ(got.out.bytes(), other.out.bytes());
    EXPECT_TRUE(std::isfinite(got.lse.read(0)));
  }
}

TEST_P(Decode, ATinyN) {
  Problem p{1, 1, 1, 1, 1, 1};
  p.n = 1e-40;
  Inputs in(p, dtype(), 3);
  in.query.set(0, 92);
  in.key.set(0, -1);
  in.value.set(0, 1);
  const double want = 1 / (1 + p.n * std::exp(92.0));
  EXPECT_NEAR(run(p, dtype(), in).out.read(0), want, want * (rounding(dtype()) + 2e-5));
}

TEST_P(Decode, ThreadsDoNotChangeABit) {
  const Problem p{2, 3, 2, 2, 700, 48, 1.0, 690, {0, 5, 100, 300, 17, 511}};
  const Inputs in(p, dtype(), 8);
  const Result one = run(p, dtype(), in);
  for (const int32_t count : {2, 5}) {
    const Result many = run(p, dtype(), in, threads(count));
    EXPECT_EQ(one.out.bytes(), many.out.bytes());
    EXPECT_EQ(one.lse.bytes(), many.lse.bytes());
  }
}

TEST_P(Decode, EmptyProblems) {
  expect_matches({1, 1, 2, 2, 0, 8}, dtype(), 9);
  expect_matches({0, 1, 1, 1, 5, 8}, dtype(), 9);
  expect_matches({2, 0, 1, 1, 5, 8}, dtype(), 9);
}

CSP_INSTANTIATE(Decode);

}  // namespace
}  // namespace csp::test
