#include <algorithm>
#include <bit>
#include <numeric>
#include <random>

#include "simt/broken_kernels.cuh"
#include "support.h"

// The primitives do what csrc/cuda/simt.cuh says: in the harness and, from the same source, on a GPU.
namespace csp::test {
namespace {

constexpr int kSeeds = 8, kBlocks = 4, kElements = kBlocks * kThreads;

std::vector<int32_t> numbers(int64_t count, int32_t below = 1000) {
  std::mt19937 random(7);
  std::vector<int32_t> out(static_cast<size_t>(count));
  for (int32_t& x : out) x = static_cast<int32_t>(random() % static_cast<uint32_t>(below));
  return out;
}

// What launch(context, in, out) leaves in `out`, which begins as zeros.
template <typename Out = int32_t, typename In, typename Launcher>
std::vector<Out> outcome(const CudaDevice& device, const std::vector<In>& in, size_t size,
                         Launcher launcher) {
  const DeviceBuffer x = to_device("in", in), y = to_device("out", std::vector<Out>(size));
  expect_ok(launcher(Launch(device, 0).context(), x.data(), y.data()));
  return y.template values<Out>();
}

LaunchShape blocks_of(int threads, int64_t shared_bytes = 0, int cluster = 1) {
  LaunchShape shape;
  shape.x = kBlocks;
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  shape.cluster = cluster;
  return shape;
}

// ---- the kernels of broken_kernels.cuh without their faults ----

// In every order of threads: launch(context, in, out) makes out[i] of in as want(in, i).
template <typename Launcher, typename Want>
void expect_outcome(const std::vector<int32_t>& in, size_t size, Launcher launcher, Want want,
                    const CudaDevice& device = devices()[0]) {
  std::vector<int32_t> wanted(size);
  for (size_t i = 0; i < size; ++i) wanted[i] = want(in, static_cast<int64_t>(i));
  for (int seed = 0; seed < (in_harness() ? kSeeds : 1); ++seed) {
    seed_threads(static_cast<uint64_t>(seed));
    EXPECT_EQ(outcome(device, in, size, launcher), wanted) << "seed " << seed;
  }
}

#define CSP_TWIN(shape, kernel, ...)                                            \
  [&](const CudaContext& context, const void* in, [[maybe_unused]] void* out) { \
    return CSP_LAUNCH(context, shape, (kernel), in, __VA_ARGS__);               \
  }

// Element i moved on by `distance` inside its block.
int32_t moved(const std::vector<int32_t>& in, int64_t i, int distance = 1) {
  return in[static_cast<size_t>(i / kThreads * kThreads + (i + distance + kThreads) % kThreads)];
}

TEST(RightKernels, BlockSum) {
  expect_outcome(numbers(kElements), kBlocks, CSP_TWIN(blocks_of(kThreads), missing_sync_block<false>, out),
                 [](const auto& in, int64_t i) {
                   return std::accumulate(in.begin() + i * kThreads, in.begin() + (i + 1) * kThreads, 0);
                 });
}

TEST(RightKernels, GlobalAndSharedMemory) {
  const std::vector<int32_t> in = numbers(kElements);
  const LaunchShape shape = blocks_of(kThreads);
  const auto next = [](const auto& from, int64_t i) { return moved(from, i); };
  expect_outcome(in, kElements, CSP_TWIN(shape, read_past_the_end<false>, out, int64_t{kElements}),
                 [](const auto& from, int64_t i) {
                   const auto at = static_cast<size_t>(i);
                   return from[at] + (at + 1 < from.size() ? from[at + 1] : 0);
                 });
  expect_outcome(in, kElements, CSP_TWIN(shape, write_past_the_end<false>, out),
                 [](const auto& from, int64_t i) { return moved(from, i, -1); });
  expect_outcome(in, kElements, CSP_TWIN(shape, divergent_barrier<false>, out),
                 [](const auto& from, int64_t i) { return from[static_cast<size_t>(i)]; });
  expect_outcome(in, kElements, CSP_TWIN(shape, barrier_in_both_branches<false>, out), next);
  expect_outcome(in, kElements, CSP_TWIN(shape, uninitialised_shared<false>, out), next);
  expect_outcome(in, kElements, CSP_TWIN(shape, write_after_read<false>, out),
                 [](const auto& from, int64_t i) { return 2 * moved(from, i, 2); });
  expect_outcome(in, kElements - 100, CSP_TWIN(shape, early_return<false>, out, int64_t{kElements - 100}),
                 [](const auto& from, int64_t i) {
                   const auto at = static_cast<size_t>(i / kThreads * kThreads + (i + 1) % kThreads);
                   return at < from.size() - 100 ? from[at] : 0;
                 });
  expect_outcome(in, kElements, CSP_TWIN(blocks_of(kThreads / 2), misaligned_vector<false>, out),
                 [](const auto& from, int64_t i) { return from[static_cast<size_t>(i)]; });
  expect_outcome(
      in, kBlocks, CSP_TWIN(shape, blocks_write_one_element<false>, out),
      [](const auto& from, int64_t i) { return from[static_cast<size_t>((i + 1) * kThreads - 1)]; });
  expect_outcome(in, kElements, CSP_TWIN(shape, readonly_written<false>, out),
                 [](const auto& from, int64_t i) { return from[static_cast<size_t>(i)] + 1; });
}

TEST(RightKernels, DynamicSharedMemory) {
  const std::vector<int32_t> in = numbers(kElements);
  const int64_t bytes = 4 * kThreads;
  expect_outcome(
      in, kElements, CSP_TWIN(blocks_of(kThreads, 2 * bytes), piece_overrun<false>, out),
      [](const auto& from, int64_t i) { return moved(from, i, int(kThreads - 1 - 2 * (i % kThreads))); });
  expect_outcome(in, kElements, CSP_TWIN(blocks_of(kThreads, bytes), arena_taken_again<false>, out),
                 [](const auto& from, int64_t i) { return moved(from, i) + int32_t((i + 1) % kThreads); });
  expect_outcome(in, kElements, CSP_TWIN(blocks_of(kThreads, bytes), shared_memory<(16 << 10)>, out),
                 [](const auto& from, int64_t i) { return 2 * moved(from, i); });
}

TEST(RightKernels, CopyAsync) {
  for (const CudaDevice& device : devices()) {
    expect_outcome(
        numbers(kElements), kElements,
        CSP_TWIN(blocks_of(kThreads / 4, 4 * kThreads), copy_without<CopyFault::kNone>, out),
        [](const auto& in, int64_t i) { return moved(in, i, 4); }, device);
  }
}

TEST(RightKernels, Warps) {
  const std::vector<int32_t> in = numbers(kElements);
  expect_outcome(in, kElements, CSP_TWIN(blocks_of(kThreads), missing_sync_warp<WarpFault::kNone>, out),
                 [](const auto& from, int64_t i) { return from[static_cast<size_t>(i ^ 31)]; });
  expect_outcome(in, kElements, CSP_TWIN(blocks_of(kThreads), divergent_shuffle<false>, out),
                 [](const auto& from, int64_t i) { return from[static_cast<size_t>(i ^ 1)]; });
}

TEST(RightKernels, Histogram) {
  expect_outcome(numbers(kElements, 64), 64,
                 CSP_TWIN(blocks_of(kThreads), plain_update_of_atomic<false>, out),
                 [](const auto& in, int64_t i) { return int32_t(std::count(in.begin(), in.end(), i)); });
}

TEST(RightKernels, Cluster) {
  const CudaDevice device = devices().back();
  if (device.capability < 90) GTEST_SKIP() << "clusters need sm_90";
  const DeviceBuffer between("between", 4 * kElements);
  expect_outcome(
      numbers(kElements), kElements,
      CSP_TWIN(blocks_of(kThreads, 0, 2), missing_sync_cluster<false>, between.data(), out),
      [](const auto& in, int64_t i) { return in[static_cast<size_t>(i ^ kThreads)]; }, device);
}

TEST(RightKernels, LdmatrixTransposed) {
  std::vector<uint16_t> in(256);
  std::iota(in.begin(), in.end(), uint16_t{1000});
  LaunchShape shape;
  shape.threads = 32;
  shape.shared_bytes = 16 * 24 * 2;
  const auto out = outcome<uint16_t>(devices().back(), in, 256, CSP_TWIN(shape, ldmatrix_rows<false>, out));
  for (size_t i = 0; i < 256; ++i) EXPECT_EQ(out[i], in[i % 16 * 16 + i / 16]) << i;
}

// ---- collectives ----

constexpr int kCollectives = 14;

CSP_KERNEL(64, 1)
void collectives_kernel(const void* in, void* out) {
  const int32_t value = global<int32_t>(in)[thread()];
  const double wide = shuffle(1.0 / value, (lane() + 1) % 32);
  const Half half = shuffle_xor(Half(static_cast<float>(lane())), 16);
  const int32_t results[kCollectives] = {shuffle(value, 3 * lane() + 1),
                                         shuffle(value, 40),
                                         shuffle_xor(value, 5),
                                         shuffle_up(value, 3),
                                         shuffle_down(value, 30),
                                         static_cast<int32_t>(ballot(value % 3 == 0)),
                                         any(value == 0),
                                         any(lane() == 31),
                                         all(value >= 0),
                                         all(lane() != 31),
                                         static_cast<int32_t>(match_any(static_cast<uint32_t>(value % 4))),
                                         sync_block_count(value % 3 == 0),
                                         sync_block_any(thread() == 40) + 2 * sync_block_any(false),
                                         static_cast<int32_t>(to_float(half)) + (wide < 1 ? 100 : 200)};
  for (int i = 0; i < kCollectives; ++i) global<int32_t>(out)[64 * i + thread()] = results[i];
}

TEST(Primitives, Collectives) {
  LaunchShape shape;
  shape.threads = 64;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    seed_threads(seed);
    std::vector<int32_t> in = numbers(64, 90);
    for (int32_t& x : in) x += 1;
    const auto out = outcome(devices()[0], in, 64 * kCollectives, CSP_TWIN(shape, collectives_kernel, out));
    for (int t = 0; t < 64; ++t) {
      const int lane = t % 32;
      const int32_t* const warp = in.data() + t / 32 * 32;
      const int32_t value = warp[lane];
      uint32_t thirds = 0, same = 0;
      for (int i = 0; i < 32; ++i) {
        thirds |= uint32_t{warp[i] % 3 == 0} << i;
        same |= uint32_t{warp[i] % 4 == value % 4} << i;
      }
      const auto count = std::count_if(in.begin(), in.end(), [](int32_t x) { return x % 3 == 0; });
      const int32_t want[kCollectives] = {warp[(3 * lane + 1) % 32],
                                          warp[8],
                                          warp[lane ^ 5],
                                          lane < 3 ? value : warp[lane - 3],
                                          lane + 30 > 31 ? value : warp[lane + 30],
                                          static_cast<int32_t>(thirds),
                                          0,
                                          1,
                                          1,
                                          0,
                                          static_cast<int32_t>(same),
                                          static_cast<int32_t>(count),
                                          1,
                                          (lane ^ 16) + (warp[(lane + 1) % 32] > 1 ? 100 : 200)};
      for (int i = 0; i < kCollectives; ++i) {
        ASSERT_EQ(out[static_cast<size_t>(64 * i + t)], want[i]) << "collective " << i << ", thread " << t;
      }
    }
  }
}

// ---- atomics ----

CSP_KERNEL(kThreads, 1)
void atomics_kernel(const void* in, void* out) {
  const int32_t value = global<int32_t>(in)[element()];
  const Global<int32_t> totals = global<int32_t>(out);
  const int32_t before = atomic_add(totals, 1);
  atomic_add(totals + 1, value);
  atomic_max(totals + 2, value);
  atomic_min(totals + 3, -value);
  atomic_or(as<uint32_t>(totals + 4), 1u << (value & 31));
  atomic_max(as<uint32_t>(totals + 5), static_cast<uint32_t>(-value));
  totals[8 + before] = 1;
}

TEST(Primitives, Atomics) {
  const std::vector<int32_t> in = numbers(kElements);
  uint32_t bits = 0, largest = 0;
  for (const int32_t x : in) {
    bits |= 1u << (x & 31);
    largest = std::max(largest, static_cast<uint32_t>(-x));
  }
  std::vector<int32_t> want(8 + kElements, 1);
  const int32_t top = *std::max_element(in.begin(), in.end());
  const int32_t totals[8] = {kElements,
                             std::accumulate(in.begin(), in.end(), 0),
                             top,
                             -top,
                             static_cast<int32_t>(bits),
                             static_cast<int32_t>(largest)};
  std::copy(totals, totals + 8, want.begin());
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    seed_threads(seed);
    EXPECT_EQ(outcome(devices()[0], in, want.size(), CSP_TWIN(blocks_of(kThreads), atomics_kernel, out)),
              want);
  }
}

// ---- numbers ----

constexpr int kConversions = 64 * 1024, kEach = 32;

// For each 16-bit pattern: as a Half and as a BFloat16; and back, from the floats of `in`.
CSP_KERNEL(256, 1)
void conversions_kernel(const void* in, void* floats, void* halves) {
  for (int64_t i = block_x() * 256 * kEach + thread(), end = i + 256 * kEach; i < end; i += 256) {
    const uint32_t pattern = static_cast<uint32_t>(i) | static_cast<uint32_t>(i) << 16;
    global<float>(floats)[i] = unpack2<Half>(pattern)[1];
    global<float>(floats)[kConversions + i] = unpack2<BFloat16>(pattern)[1];
    const float x = global<float>(in)[i];
    global<Half>(halves)[i] = from_float<Half>(x);
    global<BFloat16>(halves)[kConversions + i] = from_float<BFloat16>(x);
    global<uint32_t>(floats)[2 * kConversions + i] = pack2<Half>(x, x);
    global<uint32_t>(floats)[3 * kConversions + i] = pack2<BFloat16>(x, x);
  }
}

uint16_t half_bits(float x) {
  return std::isnan(x) ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}
uint16_t bfloat16_bits(float x) {
  // Round to nearest by double arithmetic: to the multiple of the last place that is nearest, even on a tie.
  if (std::isnan(x)) return 0x7fff;
  if (std::isinf(x) || x == 0) return static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
  const double place = std::ldexp(1.0, std::max(std::ilogb(x), -126) - 7);
  const double rounded = std::nearbyint(x / place) * place;
  const float result =
      std::abs(rounded) >= 0x1p128 ? std::copysign(INFINITY, x) : static_cast<float>(rounded);
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(result) >> 16);
}

TEST(Primitives, Conversions) {
  // Every bfloat16, and around it: the tie and its neighbours; so too every Half, by its float.
  std::vector<float> in(kConversions);
  for (const uint32_t tail : {0u, 0x7fffu, 0x8000u, 0x8001u, 0xfffu, 0x1000u, 0x1001u}) {
    for (uint32_t i = 0; i < kConversions; ++i) in[i] = std::bit_cast<float>(i << 16 | tail);
    for (const bool halves : {false, true}) {
      for (uint32_t i = 0; halves && i < kConversions; ++i) {
        const float x = static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(i)));
        in[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(x) + tail);
      }
      const DeviceBuffer x = to_device("in", in), floats("floats", size_t{16} * kConversions),
                         rounded("halves", size_t{4} * kConversions);
      LaunchShape shape;
      shape.x = kConversions / 256 / kEach;
      expect_ok(CSP_LAUNCH(Launch(devices()[0], 0).context(), shape, conversions_kernel, x.data(),
                           floats.data(), rounded.data()));
      const std::vector<uint32_t> wide = floats.values<uint32_t>();
      const std::vector<uint16_t> narrow = rounded.values<uint16_t>();
      for (uint32_t i = 0; i < kConversions; ++i) {
        const auto pattern = static_cast<uint16_t>(i);
        const auto half = static_cast<float>(std::bit_cast<_Float16>(pattern));
        const float got = std::bit_cast<float>(wide[i]);
        ASSERT_TRUE(got == half || (std::isnan(got) && std::isnan(half))) << i;
        ASSERT_EQ(wide[kConversions + i], i << 16);
        const uint16_t h = half_bits(in[i]), b = bfloat16_bits(in[i]);
        ASSERT_EQ(narrow[i], h) << in[i];
        ASSERT_EQ(narrow[kConversions + i], b) << in[i];
        ASSERT_EQ(wide[2 * kConversions + i], h | uint32_t{h} << 16) << in[i];
        ASSERT_EQ(wide[3 * kConversions + i], b | uint32_t{b} << 16) << in[i];
      }
    }
  }
}

constexpr int kFunctions = 4;

CSP_KERNEL(256, 1)
void functions_kernel(const void* in, void* out) {
  const int64_t i = block_x() * 256 + thread();
  const float x = global<float>(in)[i];
  const Global<uint32_t> y = global<uint32_t>(out) + kFunctions * i;
  y[0] = float_bits(exp2_approx(x));
  y[1] = float_bits(log2_approx(x));
  y[2] = static_cast<uint32_t>(popcount(float_bits(x)));
  y[3] = static_cast<uint32_t>(leading_zeros(float_bits(bits_float(float_bits(x)))));
}

TEST(Primitives, Functions) {
  std::vector<float> in{0.0f,    -0.0f,   INFINITY, -INFINITY, NAN,    0x1p-149f, -0x1p-149f,
                        -126.0f, -126.5f, -149.0f,  127.9f,    128.0f, 1.0f};
  std::mt19937 random(3);
  while (in.size() < 1024) in.push_back(std::uniform_real_distribution<float>(-140, 140)(random));
  LaunchShape shape;
  shape.x = 4;
  const auto out =
      outcome<uint32_t>(devices()[0], in, kFunctions * in.size(), CSP_TWIN(shape, functions_kernel, out));
  for (size_t i = 0; i < in.size(); ++i) {
    const uint32_t* const y = &out[kFunctions * i];
    const float x = in[i], power = std::bit_cast<float>(y[0]), logarithm = std::bit_cast<float>(y[1]);
    const double exact = std::exp2(static_cast<double>(x));
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(power) && std::isnan(logarithm));
    } else if (exact < 0x1p-126) {
      EXPECT_EQ(power, 0.0f) << x;
    } else if (exact >= 0x1p128) {
      EXPECT_EQ(power, INFINITY) << x;
    } else {
      EXPECT_NEAR(power, exact, 0x1p-21 * exact) << x;
    }
    if (x > 0 && !std::isinf(x)) {
      EXPECT_NEAR(logarithm, std::log2(static_cast<double>(x)), 0x1p-20 + std::abs(logarithm) * 0x1p-20) << x;
    } else if (x == 0) {
      EXPECT_EQ(logarithm, -INFINITY);
    }
    const auto bits = std::bit_cast<uint32_t>(x);
    EXPECT_EQ(y[2], static_cast<uint32_t>(std::popcount(bits)));
    EXPECT_EQ(y[3], static_cast<uint32_t>(std::countl_zero(bits)));
  }
}

// ---- tensor cores ----

// d += a b for a [16, 16], b [16, 8] in float32 d; b once as it is, once given as its transpose [8, 16].
template <typename T>
CSP_KERNEL(32, 1)
void product_kernel(const void* in, void* out) {
  constexpr int kStride = 24;
  SharedArena arena;
  const Shared<T> a = arena.take<T>(16 * kStride);
  const Shared<T> b = arena.take<T>(16 * kStride);
  const Shared<T> b_transposed = arena.take<T>(8 * kStride);
  const Global<const T> x = global<T>(in);
  for (int i = lane(); i < 256; i += 32) a[i / 16 * kStride + i % 16] = x[i];
  for (int i = lane(); i < 128; i += 32) {
    const int k = i / 8, n = i % 8;
    b[k * kStride + n] = x[256 + i];
    b[k * kStride + 8 + n] = T(0.0f);
    b_transposed[n * kStride + k] = x[256 + i];
  }
  sync_warp();
  uint32_t left[4], right[4], right_transposed[4];
  ldmatrix(left, a + lane() % 16 * kStride + lane() / 16 * 8);
  ldmatrix(right_transposed, b_transposed + lane() % 8 * kStride + lane() / 8 % 2 * 8);
  ldmatrix_transposed(right, b + lane() % 16 * kStride + lane() / 16 * 8);
  float d[2][4];
  for (int i = 0; i < 4; ++i) d[0][i] = d[1][i] = static_cast<float>(i);
  mma_m16n8k16<T>(d[0], left, right[0], right[1]);
  mma_m16n8k16<T>(d[1], left, right_transposed[0], right_transposed[1]);
  for (int which = 0; which < 2; ++which) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane() / 4 + i / 2 * 8, column = 2 * (lane() % 4) + i % 2;
      global<float>(out)[which * 128 + row * 8 + column] = d[which][i];
    }
  }
}

template <typename T>
void check_product(DType dtype) {
  const CudaDevice device = devices().back();
  if (device.capability < 80) GTEST_SKIP() << "the product needs sm_80";
  LaunchShape shape;
  shape.threads = 32;
  shape.shared_bytes = 2 * 24 * (16 + 16 + 8);
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    seed_threads(seed);
    const Buffer in = Buffer::random(dtype, 256 + 128, seed, 2.0);
    const DeviceBuffer x = to_device("in", in), y("out", 4 * 256);
    expect_ok(CSP_LAUNCH(Launch(device, 0).context(), shape, product_kernel<T>, x.data(), y.data()));
    const std::vector<float> out = y.values<float>();
    for (size_t row = 0; row < 16; ++row) {
      for (size_t column = 0; column < 8; ++column) {
        double sum = static_cast<double>(row / 8 * 2 + column % 2), size = sum;
        for (size_t k = 0; k < 16; ++k) {
          const double term = in.read(row * 16 + k) * in.read(256 + k * 8 + column);
          sum += term;
          size += std::abs(term);
        }
        for (const size_t which : {size_t{0}, size_t{128}}) {
          EXPECT_NEAR(out[which + row * 8 + column], sum, 16 * 0x1p-23 * size) << row << ", " << column;
        }
      }
    }
  }
}

TEST(Primitives, ProductOfHalves) {
  check_product<Half>(DType::kFloat16);
}
TEST(Primitives, ProductOfBFloat16s) {
  check_product<BFloat16>(DType::kBFloat16);
}

}  // namespace
}  // namespace csp::test
