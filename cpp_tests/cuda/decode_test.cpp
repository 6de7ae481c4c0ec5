#include "csp/decode.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>

#include "csp/plan.h"
#include "support.h"

namespace csp::test {
namespace {

class DecodeCuda : public PerCudaDType {
 protected:
  static DType dtype() { return GetParam(); }
};

struct Problem {
  int64_t batch = 1, heads = 1, group = 1, queries = 1, capacity = 1, dim = 1;
  double n = 1.0;
  std::optional<int32_t> end = {};
  std::vector<int32_t> start = {};  // [B, Hkv] or, per row, [B]; empty: not given
  bool slots_first = false;         // [B, C, Hkv, D] in memory
  int64_t gap = 0;                  // elements between the rows of query, key and value
  int64_t offset = 0;               // elements that each begins past an aligned address
  bool one_row = false;             // all slots of key and value are the first one: a stride of 0

  int64_t step() const { return dim + gap; }
  int64_t rows() const { return batch * heads * group * queries; }
  int64_t slots() const { return batch * heads * capacity; }
  Strides stride() const {
    if (one_row) return {heads * step(), step(), 0};
    if (slots_first) return {capacity * heads * step(), step(), heads * step()};
    return {heads * capacity * step(), capacity * step(), step()};
  }
  int64_t slot(int64_t b, int64_t h, int64_t s) const {
    return b * stride().batch + h * stride().head + s * stride().row;
  }
  int64_t first(int64_t b, int64_t h) const {
    if (start.empty()) return 0;
    const bool per_row = static_cast<int64_t>(start.size()) == batch;
    return std::max(0, start[static_cast<size_t>(per_row ? b : b * heads + h)]);
  }
  int64_t last() const { return std::min(capacity, static_cast<int64_t>(end.value_or(INT32_MAX))); }
};

testing::Message operator<<(testing::Message&& out, const Problem& p) {
  return out << "B " << p.batch << " Hkv " << p.heads << " group " << p.group << " Q " << p.queries << " C "
             << p.capacity << " D " << p.dim << " n " << p.n << " end " << p.end.value_or(-1) << " gap "
             << p.gap << " offset " << p.offset;
}

// Query, key and value; whatever no query may see is nan or inf.
struct Inputs {
  Inputs(const Problem& p, DType dtype, uint32_t seed, double spread = 1.0)
      : query(Buffer::random(dtype, static_cast<size_t>(p.rows() * p.step()), seed, spread)),
        key(Buffer::random(dtype, static_cast<size_t>(p.slots() * p.step()), seed + 1)),
        value(Buffer::random(dtype, static_cast<size_t>(p.slots() * p.step()), seed + 2)) {
    for (int64_t i = 0; i < p.batch * p.heads && !p.one_row; ++i) {
      const int64_t b = i / p.heads, h = i % p.heads;
      for (int64_t s = 0; s < p.capacity; ++s) {
        if (s >= p.first(b, h) && s < p.last()) continue;
        for (int64_t d = 0; d < p.dim; ++d) {
          key.set(static_cast<size_t>(p.slot(b, h, s) + d), s % 2 == 0 ? NAN : INFINITY);
          value.set(static_cast<size_t>(p.slot(b, h, s) + d), s % 3 == 0 ? -INFINITY : NAN);
        }
      }
    }
  }
  Buffer query, key, value;
};

DecodeParams params_of(const Problem& p, DType dtype) {
  DecodeParams params;
  params.dtype = dtype;
  params.query_stride = {p.heads * p.group * p.queries * p.step(), p.queries * p.step(), p.step()};
  params.key_stride = params.value_stride = p.stride();
  const bool per_row = static_cast<int64_t>(p.start.size()) == p.batch;
  params.start_batch = per_row ? 1 : p.heads;
  params.start_head = per_row ? 0 : 1;
  params.batch = p.batch;
  params.num_heads = p.heads * p.group;
  params.num_kv_heads = p.heads;
  params.queries = p.queries;
  params.capacity = p.capacity;
  params.head_dim = p.dim;
  params.n = p.n;
  params.scale = 1 / std::sqrt(static_cast<double>(p.dim));
  return params;
}

struct Result {
  Buffer out;
  Buffer lse;
};

Result truth(const Problem& p, const Inputs& in) {
  const Buffer query = widened(in.query), key = widened(in.key), value = widened(in.value);
  Result want{Buffer(DType::kFloat64, static_cast<size_t>(p.rows() * p.dim)),
              Buffer(DType::kFloat64, static_cast<size_t>(p.rows()))};
  DecodeParams params = params_of(p, DType::kFloat64);
  params.query = query.data();
  params.key = key.data();
  params.value = value.data();
  params.start = p.start.empty() ? nullptr : p.start.data();
  params.end = p.end ? &*p.end : nullptr;
  params.out = want.out.data();
  params.lse = want.lse.data();
  const Workspace workspace(decode_cpu_workspace_bytes(params, 1));
  decode_cpu(params, workspace.get());
  return want;
}

Result run(const Problem& p, const CudaDevice& device, DType dtype, const Inputs& in) {
  const size_t offset = static_cast<size_t>(p.offset * dtype_bytes(dtype));
  const DeviceBuffer query = to_device("query", in.query, offset), key = to_device("key", in.key, offset),
                     value = to_device("value", in.value, offset), start = to_device("start", p.start),
                     end = to_device("end", std::vector<int32_t>{p.end.value_or(0)}),
                     out("out", static_cast<size_t>(p.rows() * p.dim * dtype_bytes(dtype))),
                     lse("lse", static_cast<size_t>(p.rows()) * sizeof(float));
  DecodeParams params = params_of(p, dtype);
  const Plan plan = plan_decode_cuda(params, device);
  EXPECT_EQ(plan.workspace_bytes, static_cast<int64_t>(decode_cuda_workspace_bytes(params, device)));
  params.query = query.data();
  params.key = key.data();
  params.value = value.data();
  params.start = p.start.empty() ? nullptr : static_cast<const int32_t*>(start.data());
  params.end = p.end ? static_cast<const int32_t*>(end.data()) : nullptr;
  params.out = out.data();
  params.lse = lse.data();
  const uint32_t before = launches();
  const Launch launch(device, static_cast<size_t>(plan.workspace_bytes));
  expect_ok(decode_cuda(params, launch.context()));
  if (in_harness()) {
    EXPECT_EQ(launches() - before, plan.launches);
  }
  return {from_device(out, dtype), from_device(lse, DType::kFloat32)};
}

// One rounding of the output; what float32 accumulates, as the CPU kernel is held to; and of bfloat16 weights
// the 16 bits that two numbers carry.
void expect_equal(const Result& got, const Result& want, DType dtype) {
  const double half_ulp = 0.51 * rounding(dtype);
  const double weights = 3e-6 + (dtype == DType::kBFloat16 ? 0x1p-16 : 0);
  expect_close(got.out, want.out, half_ulp, weights);
  expect_close(got.lse, want.lse, 1e-5, 1e-5);
}

void check(const Problem& p, const CudaDevice& device, DType dtype, uint32_t seed, double spread = 1.0) {
  SCOPED_TRACE(testing::Message() << p << " sm_" << device.capability << " seed " << seed);
  seed_threads(seed);
  const Inputs in(p, dtype, seed, spread);
  expect_equal(run(p, device, dtype, in), truth(p, in), dtype);
}

TEST_P(DecodeCuda, EveryHeadDim) {
  uint32_t seed = 0;
  for (const int64_t dim : {1, 7, 8, 32, 40, 64, 72, 80, 96, 128, 136, 256, 264, 512}) {
    for (const size_t device : {0u, 1 + seed % 2}) {
      Problem p{1, 2, 1, 1, 100, dim};
      p.group = ++seed % 3 + 1;
      p.queries = seed * 7 % 8 + 1;
      check(p, devices()[device % devices().size()], dtype(), seed);
    }
  }
}

TEST_P(DecodeCuda, EveryNumberOfRows) {
  uint32_t seed = 100;
  for (const int64_t group : {1, 4, 7}) {
    for (int64_t queries = 1; queries <= 8; ++queries) {
      const CudaDevice device = devices()[++seed % devices().size()];
      check({1, 1, group, queries, 37, 32}, device, dtype(), seed);
    }
  }
}

TEST_P(DecodeCuda, EveryCapacity) {
  uint32_t seed = 200;
  for (const CudaDevice& device : devices()) {
    for (const int64_t capacity : {0, 1, 17, 63, 64, 300}) {
      const double n = std::array{0.0, 1.0, 1e6}[++seed % 3];
      check({2, 2, 1, capacity % 3 + 1, capacity, 40, n}, device, dtype(), seed);
    }
  }
}

TEST_P(DecodeCuda, SlotsOutsideTheRangeNeverLeak) {
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
  uint32_t seed = 300;
  for (const CudaDevice& device : devices()) {
    for (const int32_t end : {kMin, 0, 2, 64, 100, 150, kMax}) {
      check({2, 2, 2, 3, 150, 32, 1.0, end, {0, 33, 64, 148}}, device, dtype(), ++seed);
      check({2, 1, 1, 1, 70, 32, 1.0, end, {-5, 69}}, device, dtype(), ++seed);
      check({3, 1, 1, 2, 70, 24, 1.0, end, {kMin, kMax, 63}}, device, dtype(), ++seed);
    }
  }
}

TEST_P(DecodeCuda, AnyLayout) {
  uint32_t seed = 400;
  for (const CudaDevice& device : devices()) {
    for (const int64_t dim : {64, 20}) {
      Problem p{2, 3, 2, 2, 40, dim};
      p.slots_first = true;
      check(p, device, dtype(), ++seed);
      for (const int64_t gap : {1, 4, 8}) {
        p.gap = gap;
        check(p, device, dtype(), ++seed);
      }
      p.gap = 0;
      for (const int64_t offset : {1, 2, 4, 8}) {
        p.offset = offset;
        check(p, device, dtype(), ++seed);
      }
      p.one_row = true;
      check(p, device, dtype(), ++seed);
    }
  }
}

// More splits than a warp has lanes, and rows shorter than the capacity.
TEST_P(DecodeCuda, ManySplits) {
  uint32_t seed = 500;
  for (CudaDevice device : devices()) {
    if (in_harness()) device.multiprocessors = 132;
    const Problem one{1, 1, 2, 2, 2200, 8}, many{2, 3, 1, 1, 520, 32, 1.0, {}, {0, 0, 400, 0, 519, 13}};
    check(one, device, dtype(), ++seed);
    check(many, device, dtype(), ++seed);
    Problem brief = one;
    brief.end = 50;
    check(brief, device, dtype(), ++seed);
  }
}

TEST_P(DecodeCuda, RandomProblems) {
  std::mt19937 random(7);
  const auto pick = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  };
  for (uint32_t seed = 600; seed < 630; ++seed) {
    Problem p{pick(1, 3), pick(1, 3), pick(1, 4), pick(1, 8), pick(0, 150), pick(1, 12) * pick(1, 8)};
    p.n = pick(0, 2);
    if (pick(0, 1) == 1) p.end = static_cast<int32_t>(pick(0, p.capacity));
    for (int64_t i = 0, count = pick(0, 2) * p.batch * p.heads; i < count && i < p.batch * p.heads; ++i) {
      p.start.push_back(static_cast<int32_t>(pick(-3, p.capacity + 3)));
    }
    p.slots_first = pick(0, 1) == 1;
    check(p, devices()[static_cast<size_t>(pick(0, 99)) % devices().size()], dtype(), seed);
  }
}

TEST_P(DecodeCuda, TheNewestSlotDoesNotSpoilTheOlderQueries) {
  for (const CudaDevice& device : devices()) {
    for (const int64_t capacity : {4, 70, 300}) {
      const Problem p{1, 1, 2, 4, capacity, 24};
      Inputs in(p, dtype(), 5);
      const Result clean = run(p, device, dtype(), in);
      for (int64_t d = 0; d < p.dim; ++d) {
        in.key.set(static_cast<size_t>((capacity - 1) * p.dim + d), NAN);
        in.value.set(static_cast<size_t>((capacity - 1) * p.dim + d), NAN);
      }
      const Result spoilt = run(p, device, dtype(), in);
      for (size_t i = 0; i < spoilt.out.size(); ++i) {
        const int64_t row = static_cast<int64_t>(i) / p.dim;
        if (row % p.queries == p.queries - 1) {
          EXPECT_TRUE(std::isnan(spoilt.out.read(i))) << row;
        } else {
          EXPECT_EQ(spoilt.out.read(i), clean.out.read(i)) << row;
        }
      }
    }
  }
}

TEST_P(DecodeCuda, AVisibleNanIsNotSwallowed) {
  for (const CudaDevice& device : devices()) {
    // The last one fills whole splits.
    for (const auto& [first, last] : {std::pair{0, 1}, {150, 151}, {299, 300}, {0, 200}}) {
      const Problem p{1, 1, 1, 1, 300, 24};
      Inputs in(p, dtype(), 6);
      for (int64_t s = first; s < last; ++s) in.key.set(static_cast<size_t>(s * p.dim), NAN);
      const Result got = run(p, device, dtype(), in);
      EXPECT_TRUE(std::isnan(got.lse.read(0))) << first;
      for (size_t d = 0; d < 24; ++d) EXPECT_TRUE(std::isnan(got.out.read(d))) << first;
    }
  }
}

// Infinite logits: +inf has no softmax, -inf weighs nothing, and a row of nothing else is as good as empty.
TEST_P(DecodeCuda, InfiniteKeys) {
  for (const CudaDevice& device : devices()) {
    for (const double sign : {1.0, -1.0}) {
      for (const int64_t infinite : {1, 90}) {
        const Problem p{1, 1, 1, 1, 90, 40};
        Inputs in(p, dtype(), 8);
        for (size_t d = 0; d < 40; ++d) in.query.set(d, sign);
        for (int64_t s = 0; s < infinite; ++s) in.key.set(static_cast<size_t>(s * p.dim + 7), INFINITY);
        const Result got = run(p, device, dtype(), in);
        expect_equal(got, truth(p, in), dtype());
        EXPECT_EQ(std::isnan(got.out.read(0)), sign > 0);
      }
    }
  }
}

// An infinite value is infinite in its own column, with its sign; two of opposite signs are NaN.
TEST_P(DecodeCuda, InfiniteValues) {
  for (const CudaDevice& device : devices()) {
    const Problem p{1, 1, 3, 2, 90, 40};
    Inputs in(p, dtype(), 9);
    in.value.set(5 * 40 + 3, INFINITY);
    in.value.set(70 * 40 + 4, -INFINITY);
    in.value.set(6 * 40 + 9, INFINITY);
    in.value.set(77 * 40 + 9, -INFINITY);
    in.value.set(89 * 40 + 11, INFINITY);
    in.value.set(80 * 40 + 20, NAN);
    expect_equal(run(p, device, dtype(), in), truth(p, in), dtype());

    const Problem alone{1, 1, 1, 1, 1, 40};  // a weight of exactly 1
    Inputs one(alone, dtype(), 10);
    one.value.set(3, -INFINITY);
    expect_equal(run(alone, device, dtype(), one), truth(alone, one), dtype());
  }
}

TEST_P(DecodeCuda, HugeLogitsNeitherOverflowNorVanish) {
  for (const CudaDevice& device : devices()) {
    for (const double key : {100.0, -100.0, 60000.0, -60000.0}) {
      const Problem p{1, 1, 1, 1, 200, 8};
      Inputs in(p, dtype(), 7);
      for (size_t d = 0; d < 8; ++d) in.query.set(d, 2 * std::abs(key) > 60000 ? 60000 : 200);
      for (size_t i = 0; i < in.key.size(); ++i) in.key.set(i, key);
      expect_equal(run(p, device, dtype(), in), truth(p, in), dtype());
    }
    // Logits of a few hundred: nearly all the weight on a slot or two.
    check({1, 2, 2, 2, 200, 64}, device, dtype(), 11, 100.0);
  }
}

TEST_P(DecodeCuda, ATinyN) {
  for (const CudaDevice& device : devices()) {
    Problem p{1, 1, 1, 1, 1, 8};
    p.n = 1e-40;
    Inputs in(p, dtype(), 3);
    for (size_t d = 0; d < 8; ++d) {
      in.query.set(d, d == 0 ? 184 : 0);
      in.key.set(d, -std::sqrt(2.0));
      in.value.set(d, 1);
    }
    const double got = run(p, device, dtype(), in).out.read(0), want = truth(p, in).out.read(0);
    EXPECT_GT(want, 0.01);
    EXPECT_LT(want, 0.99);
    EXPECT_NEAR(got, want, want * (rounding(dtype()) + 2e-5));
  }
}

TEST_P(DecodeCuda, TheOrderOfThreadsDoesNotChangeABit) {
  const Problem p{2, 2, 2, 2, 200, 48, 1.0, 190, {0, 5, 100, 150}};
  const Inputs in(p, dtype(), 8);
  for (const CudaDevice& device : devices()) {
    seed_threads(1);
    const Result one = run(p, device, dtype(), in);
    for (const uint64_t seed : {2, 3}) {
      seed_threads(seed);
      const Result other = run(p, device, dtype(), in);
      EXPECT_EQ(one.out.bytes(), other.out.bytes());
      EXPECT_EQ(one.lse.bytes(), other.lse.bytes());
    }
  }
}

TEST_P(DecodeCuda, EmptyProblems) {
  for (const CudaDevice& device : devices()) {
    check({1, 1, 2, 2, 0, 8}, device, dtype(), 9);
    check({0, 1, 1, 1, 5, 8}, device, dtype(), 9);
    check({2, 0, 1, 1, 5, 8}, device, dtype(), 9);
  }
}

TEST(DecodeCudaPlan, EnoughBlocksAndNoMoreLaunchesThanNeeded) {
  const CudaDevice h200;
  CudaDevice a100{108, 80, 163 << 10, 40 << 20};
  const auto launches_of = [](const Problem& p, const CudaDevice& device) {
    return plan_decode_cuda(params_of(p, DType::kBFloat16), device).launches;
  };
  const Problem single{1, 32, 1, 1, 820, 128}, batch{24, 32, 1, 1, 820, 128}, grouped{1, 4, 7, 1, 32768, 128};
  EXPECT_EQ(launches_of(single, h200), 1);
  EXPECT_EQ(launches_of(single, a100), 2);
  EXPECT_EQ(launches_of(batch, h200), 1);
  EXPECT_EQ(launches_of(grouped, h200), 2);
  EXPECT_GT(plan_decode_cuda(params_of(single, DType::kBFloat16), h200).workspace_bytes, 0);
  EXPECT_EQ(plan_decode_cuda(params_of(batch, DType::kBFloat16), h200).workspace_bytes, 0);
}

TEST(DecodeCudaLauncher, RefusesFloat64AndASmallWorkspace) {
  const Problem p{1, 1, 1, 1, 4096, 8};
  DecodeParams params = params_of(p, DType::kFloat64);
  const size_t needed = decode_cuda_workspace_bytes(params, devices()[0]);
  EXPECT_GT(needed, 0u);
  EXPECT_STREQ(decode_cuda(params, Launch(devices()[0], needed).context()).reason,
               "float64 is not supported on CUDA");
  params.dtype = DType::kFloat32;
  EXPECT_FALSE(decode_cuda(params, Launch(devices()[0], needed - 1).context()).ok());
}

CSP_INSTANTIATE_CUDA(DecodeCuda);

}  // namespace
}  // namespace csp::test
