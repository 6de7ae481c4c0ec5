#include "csp/compact.h"

#include <algorithm>

#include "support.h"

namespace csp::test {
namespace {

// Once per instruction set that this machine has.
class Compact : public ::testing::TestWithParam<const char*> {
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

// The outputs start on a cache line, as those of torch's allocator do.
struct Line {
  alignas(64) unsigned char bytes[64];
};
class Aligned {
 public:
  void assign(size_t size, unsigned char byte) {
    lines_.resize((size + 63) / 64);
    for (Line& line : lines_) std::memset(line.bytes, byte, 64);
  }
  unsigned char* data() { return reinterpret_cast<unsigned char*>(lines_.data()); }
  unsigned char operator[](size_t i) const { return lines_[i / 64].bytes[i % 64]; }
  bool operator==(const Aligned& other) const {
    const auto same = [](const Line& a, const Line& b) { return std::memcmp(a.bytes, b.bytes, 64) == 0; };
    return std::equal(lines_.begin(), lines_.end(), other.lines_.begin(), other.lines_.end(), same);
  }

 private:
  std::vector<Line> lines_;
};

// A problem with its memory; every byte of a cache names its place, so a wrong row shows.
struct Problem {
  CompactParams params;
  std::vector<unsigned char> key, value;
  Aligned key_out, value_out;
  std::vector<int32_t> indices;

  // `gap`: elements between two rows of a cache, as in a slice of a wider buffer.
  Problem(int64_t element, int64_t batch, int64_t heads, int64_t score_heads, int64_t keys, int64_t budget,
          int64_t head_dim, int64_t value_dim, int64_t gap = 0) {
    params.element_bytes = element;
    params.batch = batch;
    params.num_kv_heads = heads;
    params.score_heads = score_heads;
    params.keys = keys;
    params.budget = budget;
    params.head_dim = head_dim;
    params.value_dim = value_dim;
    std::mt19937 random(static_cast<uint32_t>(keys * 31 + budget));
    const auto fill = [&](std::vector<unsigned char>& cache, Strides& stride, int64_t dim) {
      stride = {heads * keys * (dim + gap), keys * (dim + gap), dim + gap};
      cache.resize(static_cast<size_t>(batch * stride.batch * element));
      for (auto& byte : cache) byte = static_cast<unsigned char>(random());
    };
    fill(key, params.key_stride, head_dim);
    fill(value, params.value_stride, value_dim);
    key_out.assign(static_cast<size_t>(batch * heads * budget * head_dim * element), 0xcd);
    value_out.assign(static_cast<size_t>(batch * heads * budget * value_dim * element), 0xcd);
    std::uniform_int_distribution<int32_t> any(-1, static_cast<int32_t>(keys) - 1);
    for (int64_t i = 0; i < batch * score_heads * budget; ++i) indices.push_back(any(random));
  }

  void run(const Parallel& parallel = {}) {
    params.key = key.data();
    params.value = value.data();
    params.indices = indices.data();
    params.key_out = key_out.data();
    params.value_out = value_out.data();
    compact_cpu(params, parallel);
  }

  void expect_rows() const {
    for (int64_t b = 0; b < params.batch; ++b) {
      for (int64_t h = 0; h < params.num_kv_heads; ++h) {
        for (int64_t t = 0; t < params.budget; ++t) {
          const int64_t score_head = params.score_heads == 1 ? 0 : h;
          const int32_t index = indices[(b * params.score_heads + score_head) * params.budget + t];
          const int64_t row = (b * params.num_kv_heads + h) * params.budget + t;
          expect_row(key, params.key_stride, params.head_dim, key_out, b, h, index, row);
          expect_row(value, params.value_stride, params.value_dim, value_out, b, h, index, row);
        }
      }
    }
  }

 private:
  void expect_row(const std::vector<unsigned char>& in, const Strides& stride, int64_t dim,
                  const Aligned& out, int64_t b, int64_t h, int64_t index, int64_t row) const {
    const int64_t bytes = dim * params.element_bytes;
    const int64_t from = (b * stride.batch + h * stride.head + index * stride.row) * params.element_bytes;
    for (int64_t i = 0; i < bytes; ++i) {
      const unsigned char want = index >= 0 && index < params.keys ? in[from + i] : 0;
      ASSERT_EQ(out[static_cast<size_t>(row * bytes + i)], want)
          << "b " << b << " h " << h << " index " << index << " byte " << i;
    }
  }
};

TEST_P(Compact, CopiesRowsOfAnyElementSize) {
  for (const int64_t element : {1, 2, 4, 8, 16}) {
    for (const int64_t gap : {0, 3}) {
      Problem problem(element, 2, 3, 3, 41, 60, 5, 8, gap);
      problem.run();
      problem.expect_rows();
    }
  }
}

TEST_P(Compact, RunsStopAtTheEndOfTheCache) {
  Problem problem(4, 1, 2, 2, 300, 290, 16, 16);
  for (int32_t t = 0; t < 290; ++t) problem.indices[t] = problem.indices[290 + t] = t + 10 * (t >= 100);
  problem.indices[100] = -1;
  problem.run();
  problem.expect_rows();
}

TEST_P(Compact, OneHeadOfIndicesServesAllHeads) {
  Problem problem(2, 2, 4, 1, 37, 20, 8, 24);
  problem.run();
  problem.expect_rows();
}

TEST_P(Compact, AnIndexOutOfRangeIsNamedAndNeverRead) {
  Problem problem(4, 1, 2, 2, 9, 6, 4, 4);
  problem.run();
  EXPECT_EQ(compact_cpu_bad_index(problem.params), -1);
  for (const int32_t bad : {-2, 9, 2147483647, -2147483647 - 1}) {
    problem.indices[7] = bad;
    problem.indices[6] = 8;  // a run that would walk on into index 9
    EXPECT_EQ(compact_cpu_bad_index(problem.params), 7);
    problem.run();
    problem.expect_rows();
  }
}

TEST_P(Compact, WideRowsAreCutIntoTasksOfTheirOwn) {
  Problem problem(8, 1, 1, 1, 5, 4, 20000, 1);
  problem.run(threads(2));
  problem.expect_rows();
  EXPECT_EQ(compact_cpu_tasks(problem.params), 8);
}

TEST_P(Compact, LargeOutputsAreStreamedAlike) {
  // 64-byte rows and an aligned output of more than 2 MiB go past the caches, others do not.
  for (const int64_t dim : {16, 17}) {
    Problem problem(4, 1, 8, 8, 500, 5000, dim, 32);
    problem.indices[3] = problem.indices[4] + 1;
    problem.indices[4999] = 499;
    problem.run(threads(2));
    problem.expect_rows();
  }
}

TEST_P(Compact, EmptyProblems) {
  Problem(4, 0, 2, 2, 9, 6, 4, 4).run();
  Problem(4, 1, 0, 0, 9, 6, 4, 4).run();
  Problem(4, 1, 2, 2, 9, 0, 4, 4).run();
  Problem narrow(4, 1, 2, 2, 9, 6, 0, 4);
  narrow.run();
  narrow.expect_rows();
  Problem no_keys(4, 1, 2, 2, 0, 6, 4, 4);
  no_keys.run();
  no_keys.expect_rows();
}

TEST_P(Compact, ThreadsDoNotChangeABit) {
  Problem one(4, 2, 4, 4, 500, 400, 128, 64), two = one;
  one.run();
  two.run(threads(2));
  EXPECT_TRUE(one.key_out == two.key_out);
  EXPECT_TRUE(one.value_out == two.value_out);
}

INSTANTIATE_TEST_SUITE_P(, Compact, ::testing::Values("baseline", "avx2", "avx512"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace csp::test
