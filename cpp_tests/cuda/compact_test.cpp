#include "csp/compact.h"

#include <random>

#include "csp/plan.h"
#include "support.h"

namespace csp::test {
namespace {

// Where one of the two caches lies.
struct Layout {
  int64_t dim = 8;
  int64_t gap = 0;      // elements between two rows; -dim: all rows are one
  size_t in_byte = 0;   // past a 256-byte boundary
  size_t out_byte = 0;  // the same
};

struct Shape {
  int64_t element_bytes = 2;
  int64_t batch = 1;
  int64_t num_kv_heads = 2;
  int64_t score_heads = 2;
  int64_t keys = 20;
  int64_t budget = 10;
};

struct Cache {
  std::vector<unsigned char> in;
  Strides stride;
  size_t out_bytes;

  Cache(const Shape& s, const Layout& layout, std::mt19937& random) {
    const int64_t row = layout.dim + layout.gap, head = s.keys * row;
    stride = {s.num_kv_heads * head, head, row};
    const int64_t elements = s.batch * stride.batch + (layout.gap < 0 ? layout.dim : 0);
    in.resize(static_cast<size_t>(elements * s.element_bytes));
    for (auto& byte : in) byte = static_cast<unsigned char>(random());
    out_bytes = static_cast<size_t>(s.batch * s.num_kv_heads * s.budget * layout.dim * s.element_bytes);
  }
};

std::vector<int32_t> random_indices(const Shape& s, std::mt19937& random) {
  std::vector<int32_t> indices(static_cast<size_t>(s.batch * s.score_heads * s.budget));
  for (auto& index : indices) index = static_cast<int32_t>(random() % (s.keys + 1)) - 1;
  return indices;
}

CompactParams params_of(const Shape& s, const Layout& key, const Layout& value) {
  CompactParams params;
  params.element_bytes = s.element_bytes;
  params.batch = s.batch;
  params.num_kv_heads = s.num_kv_heads;
  params.score_heads = s.score_heads;
  params.keys = s.keys;
  params.budget = s.budget;
  params.head_dim = key.dim;
  params.value_dim = value.dim;
  return params;
}

// Every byte of the output against compact_cpu, and the bytes around it against what they were.
void check(const Shape& s, const Layout& key_layout, const Layout& value_layout,
           std::vector<int32_t> indices = {}, uint32_t seed = 1) {
  SCOPED_TRACE(testing::Message() << s.element_bytes << " bytes, B " << s.batch << ", Hkv " << s.num_kv_heads
                                  << ", Hs " << s.score_heads << ", L " << s.keys << ", T " << s.budget
                                  << ", D " << key_layout.dim << " + " << key_layout.gap << ", Dv "
                                  << value_layout.dim << " + " << value_layout.gap);
  std::mt19937 random(seed);
  const Cache key(s, key_layout, random), value(s, value_layout, random);
  if (indices.empty()) indices = random_indices(s, random);

  CompactParams params = params_of(s, key_layout, value_layout);
  params.key_stride = key.stride;
  params.value_stride = value.stride;
  params.key = key.in.data();
  params.value = value.in.data();
  params.indices = indices.data();
  // What lies around the outputs must stay as it is.
  const auto room = [](const Cache& cache, const Layout& layout) {
    return std::vector<unsigned char>(layout.out_byte + cache.out_bytes + 16, 0xcd);
  };
  std::vector<unsigned char> key_want = room(key, key_layout), value_want = room(value, value_layout);
  const DeviceBuffer key_out = to_device("key_out", key_want), value_out = to_device("value_out", value_want);
  params.key_out = key_want.data() + key_layout.out_byte;
  params.value_out = value_want.data() + value_layout.out_byte;
  compact_cpu(params);

  const DeviceBuffer key_in = to_device("key", key.in, key_layout.in_byte);
  const DeviceBuffer value_in = to_device("value", value.in, value_layout.in_byte);
  const DeviceBuffer rows = to_device("indices", indices);
  params.key = key_in.data();
  params.value = value_in.data();
  params.indices = static_cast<const int32_t*>(rows.data());
  params.key_out = static_cast<unsigned char*>(key_out.data()) + key_layout.out_byte;
  params.value_out = static_cast<unsigned char*>(value_out.data()) + value_layout.out_byte;
  const CudaDevice device = devices()[0];
  const uint32_t before = launches();
  expect_ok(compact_cuda(params, Launch(device, 0).context()));
  if (in_harness()) {
    EXPECT_EQ(launches() - before, plan_compact_cuda(params, device).launches);
  }
  EXPECT_EQ(key_out.values<unsigned char>(), key_want);
  EXPECT_EQ(value_out.values<unsigned char>(), value_want);
}

TEST(CompactCuda, CopiesRowsOfAnyElementSize) {
  for (const int64_t element : {1, 2, 4, 8, 16}) {
    for (const int64_t gap : {0, 3}) check({element, 2, 3, 3, 41, 60}, {5, gap}, {8, gap});
  }
}

// A bfloat16 row of 128 is 16 units of 16 bytes: a block has 64 rows, and 100 rows are a block and a part.
TEST(CompactCuda, ManyRowsOfUsualLength) {
  check({2, 2, 2, 2, 70, 100}, {128}, {128});
  check({4, 1, 1, 1, 70, 40}, {128}, {96});
}

TEST(CompactCuda, KeyAndValueEachHaveTheirOwnUnit) {
  check({2, 1, 2, 2, 30, 33}, {64}, {7});
  check({2, 1, 2, 2, 30, 33}, {2}, {64});
  check({2, 1, 2, 2, 30, 33}, {80, 48}, {64, 4});
}

TEST(CompactCuda, MisalignedTensors) {
  for (const size_t byte : {2, 4, 8, 16}) {
    check({2, 1, 2, 2, 20, 9}, {64, 0, byte}, {64, 0, 0, byte});
    check({2, 1, 2, 2, 20, 9}, {64}, {64, static_cast<int64_t>(byte) / 2});
  }
}

TEST(CompactCuda, RowsLongerThanABlock) {
  check({4, 1, 2, 1, 3, 4}, {4 * 2500}, {2500, 1});
  check({1, 1, 1, 1, 3, 4}, {1025}, {1023});
  check({1, 1, 1, 1, 3, 4}, {1024, 1}, {2049});
}

TEST(CompactCuda, OneHeadOfIndicesServesAllHeads) {
  check({2, 3, 4, 1, 37, 20}, {8}, {24});
}

TEST(CompactCuda, RowsMayOverlapOrBeOne) {
  check({2, 1, 2, 2, 20, 30}, {64, -56}, {64, -64});  // sliding windows; an expanded row
}

TEST(CompactCuda, AnIndexOutOfRangeGivesZerosAndIsNeverRead) {
  check({2, 1, 1, 1, 9, 8}, {64}, {3}, {8, 9, -1, -2, 2147483647, -2147483647 - 1, 10, 0});
  check({2, 1, 1, 1, 9, 3}, {64}, {3}, {-1, -1, -1});
}

TEST(CompactCuda, AnEmptyCacheGivesZeros) {
  check({2, 1, 2, 2, 0, 5}, {16}, {3});
}

TEST(CompactCuda, RandomProblems) {
  std::mt19937 random(7);
  const auto upto = [&](uint32_t limit) { return static_cast<int64_t>(random() % limit); };
  for (uint32_t round = 0; round < 60; ++round) {
    seed_threads(round);
    const int64_t heads = 1 + upto(4), element = int64_t{1} << upto(5);
    const Shape shape = {element, 1 + upto(3), heads, upto(2) ? 1 : heads, 1 + upto(50), 1 + upto(90)};
    const auto layout = [&] {
      const int64_t dim = 1 + upto(upto(2) ? 20 : 100);
      return Layout{upto(2) ? dim : 8 * dim % 128 + 8, upto(2) ? 0 : upto(9),
                    static_cast<size_t>(upto(4)) * 4, static_cast<size_t>(upto(4)) * 4};
    };
    check(shape, layout(), layout(), {}, round);
  }
}

TEST(CompactCuda, EmptyProblemsLaunchNothing) {
  check({2, 0, 2, 2, 9, 6}, {4}, {4});
  check({2, 1, 0, 0, 9, 6}, {4}, {4});
  check({2, 1, 2, 2, 9, 0}, {4}, {4});
  check({2, 1, 2, 2, 9, 6}, {0}, {0});
  check({2, 1, 2, 2, 9, 6}, {0}, {4});
}

TEST(CompactCuda, MoreHeadsThanAGridHasRows) {
  if (in_harness()) GTEST_SKIP() << "needs a GPU: the harness would take minutes";
  check({2, 1100, 64, 64, 3, 2}, {8}, {4});
}

TEST(CompactCuda, ThePlanCountsWhatIsCopied) {
  const Plan plan = plan_compact_cuda(params_of({2, 2, 4, 1, 100, 30}, {64}, {32}), devices()[0]);
  EXPECT_EQ(plan.bytes_written, 2 * 4 * 30 * (64 + 32) * 2);
  EXPECT_EQ(plan.bytes_read, plan.bytes_written + 2 * 30 * 4);
  EXPECT_EQ(plan.workspace_bytes, 0);
}

}  // namespace
}  // namespace csp::test
