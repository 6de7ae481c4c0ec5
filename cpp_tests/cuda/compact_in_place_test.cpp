#include "csp/compact_in_place.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "compact_in_place_plan.h"
#include "csp/plan.h"
#include "support.h"

namespace csp::test {
namespace {

// Where one of the two caches lies.
struct Layout {
  int64_t dim = 8;
  int64_t gap = 0;  // elements between two rows
  size_t byte = 0;  // past a 256-byte boundary
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
  Strides stride;
  std::vector<unsigned char> bytes;

  Cache(const Shape& s, const Layout& layout, std::mt19937& random) {
    const int64_t row = layout.dim + layout.gap, head = s.keys * row;
    stride = {s.num_kv_heads * head, head, row};
    bytes.resize(static_cast<size_t>(s.batch * stride.batch * s.element_bytes));
    for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
  }
};

// Ascending keys, free slots on the left of some rows.
std::vector<int32_t> random_indices(const Shape& s, std::mt19937& random) {
  std::vector<int32_t> all(static_cast<size_t>(s.keys)), indices;
  std::iota(all.begin(), all.end(), 0);
  for (int64_t row = 0; row < s.batch * s.score_heads; ++row) {
    const auto any = static_cast<int64_t>(random() % static_cast<uint32_t>(s.budget + 1));
    const int64_t length = random() % 2 ? s.budget : any;
    indices.insert(indices.end(), static_cast<size_t>(s.budget - length), -1);
    std::sample(all.begin(), all.end(), std::back_inserter(indices), length, random);
  }
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

// Every byte of both caches against compact_in_place_cpu, which leaves the same rows behind: neither writes
// past slot T - 1. On each device: with fewer multiprocessors the slices are wider.
void check(const Shape& s, const Layout& key_layout, const Layout& value_layout,
           std::vector<int32_t> indices = {}, uint32_t seed = 1) {
  SCOPED_TRACE(testing::Message() << s.element_bytes << " bytes, B " << s.batch << ", Hkv " << s.num_kv_heads
                                  << ", Hs " << s.score_heads << ", L " << s.keys << ", T " << s.budget
                                  << ", D " << key_layout.dim << " + " << key_layout.gap << ", Dv "
                                  << value_layout.dim << " + " << value_layout.gap);
  std::mt19937 random(seed);
  Cache key(s, key_layout, random), value(s, value_layout, random);
  if (indices.empty()) indices = random_indices(s, random);
  const DeviceBuffer rows = to_device("indices", indices);

  std::vector<CudaDevice> played = devices();
  if (in_harness()) played = {{.multiprocessors = 1}, {.multiprocessors = 132}};
  for (const CudaDevice& device : played) {
    CompactParams params = params_of(s, key_layout, value_layout);
    params.key_stride = key.stride;
    params.value_stride = value.stride;
    params.indices = static_cast<const int32_t*>(rows.data());
    const DeviceBuffer key_there = to_device("key", key.bytes, key_layout.byte);
    const DeviceBuffer value_there = to_device("value", value.bytes, value_layout.byte);
    params.key = params.key_out = key_there.data();
    params.value = params.value_out = value_there.data();
    const uint32_t before = launches();
    expect_ok(compact_in_place_cuda(params, Launch(device, 0).context()));
    if (in_harness()) {
      EXPECT_EQ(launches() - before, plan_compact_in_place_cuda(params, device).launches);
    }

    Cache key_want = key, value_want = value;
    params.indices = indices.data();
    params.key = params.key_out = key_want.bytes.data();
    params.value = params.value_out = value_want.bytes.data();
    compact_in_place_cpu(params);
    EXPECT_EQ(key_there.values<unsigned char>(), key_want.bytes);
    EXPECT_EQ(value_there.values<unsigned char>(), value_want.bytes);
  }
}

TEST(CompactInPlaceCuda, MovesRowsOfAnyElementSize) {
  for (const int64_t element : {1, 2, 4, 8, 16}) {
    for (const int64_t gap : {0, 3}) check({element, 2, 3, 3, 61, 41}, {5, gap}, {8, gap});
  }
}

// A bfloat16 row of 128 is 16 units of 16 bytes: a tile has 64 rows, or 256 where a row is cut into four.
TEST(CompactInPlaceCuda, ManyTilesOfUsualLength) {
  check({2, 1, 2, 2, 400, 300}, {128}, {128});
  check({4, 1, 1, 1, 170, 140}, {128}, {96});
}

TEST(CompactInPlaceCuda, AWholeRowMovesOneSlot) {
  std::vector<int32_t> left(200), right(200, -1);
  std::iota(left.begin(), left.end(), 1);
  std::iota(right.begin() + 1, right.end(), 0);
  for (uint64_t seed = 0; seed < 4; ++seed) {
    seed_threads(seed);
    check({2, 1, 1, 1, 201, 200}, {128}, {20}, left);
    check({2, 1, 1, 1, 201, 200}, {128}, {20}, right);
  }
}

// Rows that move right, rows that move left and rows that stay, free slots among them.
TEST(CompactInPlaceCuda, FreeSlotsBetweenTheRows) {
  std::mt19937 random(5);
  for (uint32_t round = 0; round < 20; ++round) {
    seed_threads(round);
    std::vector<int32_t> indices(150, -1);
    for (size_t t = 0, next = random() % 5; t < indices.size() && next < 160; ++t) {
      if (random() % 3 == 0) continue;
      indices[t] = static_cast<int32_t>(next);
      next += 1 + (random() % 4 == 0 ? random() % 9 : 0);
    }
    check({2, 1, 1, 1, 160, 150}, {64}, {128}, indices, round);
  }
}

TEST(CompactInPlaceCuda, KeyAndValueEachHaveTheirOwnUnit) {
  check({2, 1, 2, 2, 40, 33}, {64}, {7});
  check({2, 1, 2, 2, 40, 33}, {2}, {64});
  check({2, 1, 2, 2, 40, 33}, {80, 48}, {64, 4});
}

TEST(CompactInPlaceCuda, MisalignedTensors) {
  for (const size_t byte : {2, 4, 8, 16}) {
    check({2, 1, 2, 2, 20, 9}, {64, 0, byte}, {64, static_cast<int64_t>(byte) / 2});
  }
}

TEST(CompactInPlaceCuda, RowsLongerThanATile) {
  check({4, 1, 2, 1, 6, 4}, {4 * 2500}, {2500, 1});
  check({1, 1, 1, 1, 6, 5}, {1025}, {1023});
  check({1, 1, 1, 1, 6, 5}, {1024, 1}, {2049});
}

TEST(CompactInPlaceCuda, OneHeadOfIndicesServesAllHeads) {
  check({2, 3, 4, 1, 37, 20}, {8}, {24});
}

TEST(CompactInPlaceCuda, AnIndexOutOfRangeIsAFreeSlot) {
  check({2, 1, 1, 1, 9, 8}, {64}, {3}, {-2, 0, 9, 2147483647, 2, -2147483647 - 1, 7, 8});
  check({2, 1, 1, 1, 9, 3}, {64}, {3}, {-1, -1, -1});
}

TEST(CompactInPlaceCuda, RandomProblems) {
  std::mt19937 random(7);
  const auto upto = [&](uint32_t limit) { return static_cast<int64_t>(random() % limit); };
  for (uint32_t round = 0; round < 60; ++round) {
    seed_threads(round);
    const int64_t heads = 1 + upto(4), element = int64_t{1} << upto(5), keys = 1 + upto(90);
    const Shape shape = {element, 1 + upto(3), heads, upto(2) ? 1 : heads, keys, 1 + upto(keys)};
    const auto layout = [&] {
      const int64_t dim = 1 + upto(upto(2) ? 20 : 100);
      return Layout{upto(2) ? dim : 8 * dim % 128 + 8, upto(2) ? 0 : upto(9),
                    static_cast<size_t>(upto(4)) * 4};
    };
    check(shape, layout(), layout(), {}, round);
  }
}

TEST(CompactInPlaceCuda, EmptyProblemsLaunchNothing) {
  check({2, 0, 2, 2, 9, 6}, {4}, {4});
  check({2, 1, 0, 0, 9, 6}, {4}, {4});
  check({2, 1, 2, 2, 9, 0}, {4}, {4});
  check({2, 1, 2, 2, 9, 6}, {0}, {0});
  check({2, 1, 2, 2, 9, 6}, {0}, {4});
}

// LLaVA-1.5-7B in bfloat16 on an H200: at batch 1 a row is cut into four, at batch 24 it is whole.
TEST(CompactInPlaceCuda, FewHeadsGetNarrowSlices) {
  const auto slices = [](int64_t batch, int64_t heads, int64_t dim) {
    CompactParams params = params_of({2, batch, heads, heads, 4096, 820}, {dim}, {dim});
    return compact_in_place_cut(params, nullptr, {heads * 4096 * dim, 4096 * dim, dim}, dim, CudaDevice())
        .slices;
  };
  EXPECT_EQ(slices(1, 32, 128), 4);
  EXPECT_EQ(slices(8, 32, 128), 2);
  EXPECT_EQ(slices(24, 32, 128), 1);
  EXPECT_EQ(slices(24, 32, 10000), 2);
  EXPECT_EQ(slices(1, 1, 16), 1);
}

TEST(CompactInPlaceCuda, ThePlanCountsWhatIsMoved) {
  const Plan plan = plan_compact_in_place_cuda(params_of({2, 2, 4, 1, 100, 30}, {64}, {32}), devices()[0]);
  EXPECT_EQ(plan.bytes_written, 2 * 4 * 30 * (64 + 32) * 2);
  EXPECT_EQ(plan.bytes_read, plan.bytes_written + 2 * 30 * 4);
  EXPECT_EQ(plan.workspace_bytes, 0);
  EXPECT_EQ(plan.launches, 1);
}

}  // namespace
}  // namespace csp::test
