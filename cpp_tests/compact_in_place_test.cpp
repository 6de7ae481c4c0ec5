#include "csp/compact_in_place.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <numeric>

#include "support.h"

namespace csp::test {
namespace {

// Once per instruction set that this machine has.
class CompactInPlace : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    setenv("CSP_CPU_CAPABILITY", GetParam(), 1);
    reset_cpu_isa();
    if (std::string(cpu_isa_name()) != GetParam()) GTEST_SKIP() << "this CPU has no " << GetParam();
  }
  void TearDown() override {
    unsetenv("CSP_CPU_CAPABILITY");
    reset_cpu_isa();
  }
};

// A cache whose first byte is on a cache line.
struct Cache {
  explicit Cache(size_t size) : bytes(size), memory(size) {}
  Cache(const Cache& other) : Cache(other.bytes) {
    if (bytes > 0) std::memcpy(memory.get(), other.memory.get(), bytes);
  }
  unsigned char* data() const { return static_cast<unsigned char*>(memory.get()); }
  bool operator==(const Cache& other) const {
    return bytes == other.bytes && (bytes == 0 || std::memcmp(data(), other.data(), bytes) == 0);
  }

  size_t bytes;
  Workspace memory;
};

// A problem with its memory. `gap`: elements between two rows, which must stay as they are.
struct Problem {
  CompactParams params;
  Cache key, value;
  std::vector<int32_t> indices;

  Problem(int64_t element, int64_t batch, int64_t heads, int64_t score_heads, int64_t keys, int64_t budget,
          int64_t head_dim, int64_t value_dim, int64_t gap = 0)
      : params{.element_bytes = element,
               .key_stride = {heads * keys * (head_dim + gap), keys * (head_dim + gap), head_dim + gap},
               .value_stride = {heads * keys * (value_dim + gap), keys * (value_dim + gap), value_dim + gap},
               .batch = batch,
               .num_kv_heads = heads,
               .score_heads = score_heads,
               .keys = keys,
               .budget = budget,
               .head_dim = head_dim,
               .value_dim = value_dim},
        key(static_cast<size_t>(batch * params.key_stride.batch * element)),
        value(static_cast<size_t>(batch * params.value_stride.batch * element)) {
    std::mt19937 random(static_cast<uint32_t>(keys * 31 + budget));
    for (Cache* cache : {&key, &value}) {
      for (size_t i = 0; i < cache->bytes; ++i) cache->data()[i] = static_cast<unsigned char>(random());
    }
    for (int64_t row = 0; row < batch * score_heads; ++row) {
      append(static_cast<int64_t>(random() % static_cast<uint32_t>(budget + 1)), random);
    }
  }

  // A row of `length` random keys in ascending order, free slots on its left.
  void append(int64_t length, std::mt19937& random) {
    std::vector<int32_t> all(static_cast<size_t>(params.keys)), row(static_cast<size_t>(params.budget), -1);
    std::iota(all.begin(), all.end(), 0);
    std::sample(all.begin(), all.end(), row.end() - length, length, random);
    indices.insert(indices.end(), row.begin(), row.end());
  }

  void run(const Parallel& parallel = {}) {
    params.key = params.key_out = key.data();
    params.value = params.value_out = value.data();
    params.indices = indices.data();
    compact_in_place_cpu(params, parallel);
  }

  // Runs, and holds the first slots against those of the caches before, and what no slot holds to itself.
  void check(const Parallel& parallel = {}) {
    const Cache key_before = key, value_before = value;
    run(parallel);
    compare(key_before, key, params.key_stride, params.head_dim, "key");
    compare(value_before, value, params.value_stride, params.value_dim, "value");
  }

 private:
  void compare(const Cache& before, const Cache& after, const Strides& stride, int64_t dim,
               const char* name) const {
    if (before.bytes == 0) return;
    const auto bytes = static_cast<size_t>(dim * params.element_bytes);
    const std::vector<unsigned char> zeros(bytes);
    const auto row = [&](const Cache& cache, int64_t b, int64_t h, int64_t t) {
      return cache.data() + (b * stride.batch + h * stride.head + t * stride.row) * params.element_bytes;
    };
    for (int64_t b = 0; b < params.batch; ++b) {
      for (int64_t h = 0; h < params.num_kv_heads; ++h) {
        const int64_t score_head = params.score_heads == 1 ? 0 : h;
        const int32_t* head = indices.data() + (b * params.score_heads + score_head) * params.budget;
        for (int64_t t = 0; t < params.budget; ++t) {
          const bool free = head[t] < 0 || head[t] >= params.keys;
          const unsigned char* want = free ? zeros.data() : row(before, b, h, head[t]);
          ASSERT_EQ(std::memcmp(row(after, b, h, t), want, bytes), 0)
              << name << " of b " << b << " h " << h << " t " << t << " from " << head[t];
        }
        const size_t gap = static_cast<size_t>(stride.row * params.element_bytes) - bytes;
        for (int64_t t = 0; t < params.keys; ++t) {
          ASSERT_EQ(std::memcmp(row(after, b, h, t) + bytes, row(before, b, h, t) + bytes, gap), 0)
              << "the gap after " << name << " of b " << b << " h " << h << " t " << t;
        }
      }
    }
  }
};

TEST_P(CompactInPlace, MovesRowsOfAnyElementSize) {
  for (const int64_t element : {1, 2, 4, 8, 16}) {
    for (const int64_t gap : {0, 3}) Problem(element, 2, 3, 3, 61, 40, 5, 8, gap).check();
  }
}

// Every length of a row of up to seven slots, every set of kept keys.
TEST_P(CompactInPlace, EveryChoiceOfAFewKeys) {
  constexpr int64_t kKeys = 7;
  for (int64_t budget = 0; budget <= kKeys; ++budget) {
    for (uint32_t chosen = 0; chosen < 1u << kKeys; ++chosen) {
      if (std::popcount(chosen) > budget) continue;
      for (const int64_t gap : {0, 1}) {
        Problem problem(1, 1, 1, 1, kKeys, budget, 3, 2, gap);
        problem.indices.assign(static_cast<size_t>(budget), -1);
        auto slot = problem.indices.end() - std::popcount(chosen);
        for (int32_t key = 0; key < kKeys; ++key) {
          if (chosen >> key & 1) *slot++ = key;
        }
        problem.check();
      }
    }
  }
}

// Rows that move right, rows that move left and rows that stay, whose free slots may stand anywhere.
TEST_P(CompactInPlace, FreeSlotsBetweenTheRows) {
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    Problem problem(4, 1, 2, 1, 30, 1 + static_cast<int64_t>(random() % 30), 4, 6, round % 2);
    std::vector<int32_t> kept;
    std::copy_if(problem.indices.begin(), problem.indices.end(), std::back_inserter(kept),
                 [](int32_t index) { return index >= 0; });
    std::shuffle(problem.indices.begin(), problem.indices.end(), random);
    auto next = kept.begin();
    for (int32_t& index : problem.indices) {
      if (index >= 0) index = *next++;
    }
    problem.params.indices = problem.indices.data();
    EXPECT_EQ(compact_in_place_cpu_bad_order(problem.params), -1);
    problem.check();
  }
}

TEST_P(CompactInPlace, OneHeadOfIndicesServesAllHeads) {
  Problem(2, 2, 4, 1, 37, 20, 8, 24).check();
}

TEST_P(CompactInPlace, LongRunsOverlapThemselves) {
  for (const int64_t shift : {1, 2, 40}) {
    Problem left(4, 1, 1, 1, 300, 200, 16, 3), right(4, 1, 1, 1, 300, 200, 16, 3);
    for (int64_t t = 0; t < 200; ++t) {
      left.indices[static_cast<size_t>(t)] = static_cast<int32_t>(t + shift);
      right.indices[static_cast<size_t>(t)] = static_cast<int32_t>(t < shift ? -1 : t - shift);
    }
    left.check();
    right.check();
  }
}

TEST_P(CompactInPlace, LargeCachesAreStreamedAlike) {
  // 64-byte rows of more than 2 MiB go past the caches, others do not.
  for (const int64_t dim : {16, 17}) {
    for (const int64_t gap : {0, 16}) {
      Problem problem(4, 1, 8, 8, 5500, 5000, dim, 32, gap);
      for (int32_t t = 0; t < 5000; ++t) problem.indices[static_cast<size_t>(t)] = t + (t >= 7) + (t >= 4000);
      problem.check(threads(2));
    }
  }
}

TEST_P(CompactInPlace, AnIndexOutOfRangeIsAFreeSlot) {
  Problem problem(4, 1, 1, 1, 9, 8, 4, 4);
  problem.indices = {-2, 0, 9, 2147483647, 2, -2147483647 - 1, 7, 8};
  problem.check();
}

TEST_P(CompactInPlace, AnIndexOutOfOrderIsNamed) {
  Problem problem(4, 1, 2, 2, 9, 4, 4, 4);
  const auto bad = [&](std::vector<int32_t> indices) {
    problem.indices = std::move(indices);
    problem.params.indices = problem.indices.data();
    return compact_in_place_cpu_bad_order(problem.params);
  };
  EXPECT_EQ(bad({-1, -1, -1, -1, 0, 1, 2, 8}), -1);
  EXPECT_EQ(bad({5, 6, 7, 8, -1, 0, -1, 3}), -1);
  EXPECT_EQ(bad({5, 6, 6, 8, -1, 0, 1, 3}), 2);
  EXPECT_EQ(bad({5, 6, 7, 8, 4, -1, 3, 5}), 6);
}

TEST_P(CompactInPlace, EmptyProblems) {
  Problem(4, 0, 2, 2, 9, 6, 4, 4).check();
  Problem(4, 1, 0, 0, 9, 6, 4, 4).check();
  Problem(4, 1, 2, 2, 9, 0, 4, 4).check();
  Problem(4, 1, 2, 2, 0, 0, 4, 4).check();
  Problem(4, 1, 2, 2, 9, 6, 0, 4).check();
}

TEST_P(CompactInPlace, ThreadsDoNotChangeABit) {
  Problem one(4, 2, 4, 4, 500, 400, 128, 64), two = one;
  EXPECT_EQ(compact_in_place_cpu_tasks(one.params), 16);
  one.run();
  two.run(threads(2));
  EXPECT_TRUE(one.key == two.key);
  EXPECT_TRUE(one.value == two.value);
}

INSTANTIATE_TEST_SUITE_P(, CompactInPlace, ::testing::Values("baseline", "avx2", "avx512"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace csp::test
