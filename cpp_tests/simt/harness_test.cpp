#include <ctime>
#include <iostream>
#include <numeric>
#include <set>

#include <gtest/gtest.h>

#include "cuda/support.h"
#include "simt/broken_kernels.cuh"

// The harness refuses each broken kernel, in every order of its threads, and says what is wrong with it. That
// it lets their right twins pass, with the right numbers, is tested in primitives_test.
namespace csp::test {
namespace {

constexpr int kSeeds = 20, kBlocks = 4, kElements = kBlocks * kThreads;

CudaContext context_of(int32_t capability = 90, int64_t shared_bytes = 227 << 10) {
  CudaContext context;
  context.device.capability = capability;
  context.device.shared_bytes = shared_bytes;
  return context;
}

LaunchShape blocks_of(int threads, int64_t shared_bytes = 0, int cluster = 1) {
  LaunchShape shape;
  shape.x = kBlocks;
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  shape.cluster = cluster;
  return shape;
}

// The violation that launch(in, out) ends in, where `in` holds kElements numbers and `out` so many zeros.
template <typename Launcher>
std::string violation_of(Launcher launcher) {
  std::vector<int32_t> numbers(kElements);
  std::iota(numbers.begin(), numbers.end(), 0);
  const DeviceBuffer in = to_device("in", numbers), out = to_device("out", std::vector<int32_t>(kElements));
  try {
    const CudaStatus status = launcher(in.data(), out.data());
    return status.ok() ? "it passed" : "it was not launched";
  } catch (const Violation& violation) {
    return violation.what();
  }
}

// Whether `text` contains `pattern`, in which | separates alternatives.
bool contains(const std::string& text, const std::string& pattern) {
  for (size_t begin = 0;;) {
    const size_t end = pattern.find('|', begin);
    if (text.find(pattern.substr(begin, end - begin)) != std::string::npos) return true;
    if (end == std::string::npos) return false;
    begin = end + 1;
  }
}

// Refused in every order, each time with all these words.
template <typename Launcher>
void expect_violation(Launcher launcher, const std::vector<std::string>& words) {
  for (uint64_t s = 0; s < kSeeds; ++s) {
    seed(s);
    const std::string message = violation_of(launcher);
    if (s == 0) std::cout << "  " << message << "\n";
    for (const std::string& word : words)
      EXPECT_TRUE(contains(message, word)) << message << "\nlacks " << word;
  }
}

#define CSP_BROKEN(shape, kernel, ...)                                 \
  [&](const void* in, [[maybe_unused]] void* out) {                    \
    return CSP_LAUNCH(context_of(), shape, (kernel), in, __VA_ARGS__); \
  }

// ---- memory ----

TEST(Harness, ReadPastTheEnd) {
  expect_violation(CSP_BROKEN(blocks_of(kThreads), read_past_the_end<true>, out, int64_t{kElements}),
                   {"read_past_the_end<true>: block (3, 0, 0) thread 127 at broken_kernels.cuh:",
                    "reads 4 bytes at byte 2048 of in, which has 2048 bytes"});
}

TEST(Harness, WritePastTheEnd) {
  expect_violation(CSP_BROKEN(blocks_of(kThreads), write_past_the_end<true>, out),
                   {"write_past_the_end<true>: block (", "thread 127 at broken_kernels.cuh:",
                    "writes 4 bytes at byte 512 of static shared memory moved, which has 512 bytes"});
}

TEST(Harness, PieceOverrun) {
  expect_violation(
      CSP_BROKEN(blocks_of(kThreads, 8 * kThreads), piece_overrun<true>, out),
      {"thread 127 at", "writes 4 bytes at byte 512 of shared memory [0, 512), which has 512 bytes"});
}

TEST(Harness, ArenaOverrun) {
  expect_violation(CSP_BROKEN(blocks_of(kThreads, 4 * kThreads), piece_overrun<false>, out),
                   {"takes bytes [512, 1024) of the dynamic shared memory, which has 512"});
}

TEST(Harness, TooMuchSharedMemory) {
  const LaunchShape shape = blocks_of(kThreads, (227 << 10) - (16 << 10));
  EXPECT_EQ(violation_of(CSP_BROKEN(shape, shared_memory<(16 << 10)>, out)), "it passed");
  expect_violation(
      CSP_BROKEN(shape, shared_memory<(20 << 10)>, out),
      {"has 20480 bytes of static and 216064 of dynamic shared memory, more than 49152 static or 232448"});
  expect_violation(CSP_BROKEN(blocks_of(kThreads, 4 * kThreads), shared_memory<(52 << 10)>, out),
                   {"has 53248 bytes of static and 512 of dynamic shared memory"});
  EXPECT_EQ(violation_of(CSP_BROKEN(blocks_of(kThreads, (227 << 10) + 1), shared_memory<1024>, out)),
            "it was not launched");
}

TEST(Harness, MisalignedVector) {
  expect_violation(
      CSP_BROKEN(blocks_of(kThreads / 2), misaligned_vector<true>, out),
      {"misaligned_vector<true>: block (", "reads 8 bytes at byte ", "of in, not aligned to 8 bytes"});
}

TEST(Harness, UninitialisedShared) {
  expect_violation(CSP_BROKEN(blocks_of(kThreads), uninitialised_shared<true>, out),
                   {"thread 8 at broken_kernels.cuh:",
                    "reads byte 36 of static shared memory values, which nobody has written"});
}

TEST(Harness, MemoryThatIsNotTheDevices) {
  const std::vector<int32_t> host(kElements);
  expect_violation(
      [&](const void*, void* out) {
        const LaunchShape shape = blocks_of(kThreads);
        return CSP_LAUNCH(context_of(), shape, (blocks_write_one_element<false>), host.data(), out);
      },
      {"reads 4 bytes of memory that is not the device's"});
}

CSP_KERNEL(32, 1)
void read_before(const void* in, void* out) {
  global<int32_t>(out)[thread()] = global<int32_t>(in)[thread() - 1];
}

TEST(Harness, TheBytesBeforeAMisalignedBuffer) {
  const DeviceBuffer in = to_device("moved", std::vector<int32_t>(32), 8);
  expect_violation(
      [&](const void*, void* out) {
        return CSP_LAUNCH(context_of(), blocks_of(32), read_before, in.data(), out);
      },
      {"thread 0 at", "reads 4 bytes at byte -4 of moved"});
}

// ---- races ----

TEST(Harness, MissingSyncBlock) {
  expect_violation(
      CSP_BROKEN(blocks_of(kThreads), missing_sync_block<true>, out),
      {"missing_sync_block<true>: block (", "reads byte |writes byte ",
       "of static shared memory sums, which thread ",
       "wrote at broken_kernels.cuh:|read at broken_kernels.cuh:", "without sync_block between them"});
}

struct Unchecked {
  Unchecked() { check_accesses(false); }
  ~Unchecked() { check_accesses(true); }
};

// Without the detector the order of the threads is all that shows a missing barrier.
TEST(Harness, TheOrderAloneShowsMostMissingBarriers) {
  const Unchecked unchecked;
  const auto wrong = [](const char* name, auto launcher, auto want) {
    std::vector<int32_t> numbers(kElements);
    std::iota(numbers.begin(), numbers.end(), 1);
    int count = 0;
    for (uint64_t s = 0; s < kSeeds; ++s) {
      seed(s);
      const DeviceBuffer in = to_device("in", numbers),
                         out = to_device("out", std::vector<int32_t>(kElements));
      expect_ok(launcher(in.data(), out.data()));
      const std::vector<int32_t> got = out.values<int32_t>();
      bool same = true;
      for (size_t i = 0; i < kElements; ++i) same = same && got[i] == want(numbers, i);
      count += !same;
    }
    std::cout << "  " << name << ": wrong numbers for " << count << " of " << kSeeds << " seeds\n";
    EXPECT_GE(2 * count, int{kSeeds}) << name;
  };
  wrong("missing sync_block in a sum", CSP_BROKEN(blocks_of(kThreads), missing_sync_block<true>, out),
        [](const auto& in, size_t i) {
          return i < kBlocks ? std::accumulate(in.begin() + i * kThreads, in.begin() + (i + 1) * kThreads, 0)
                             : 0;
        });
  wrong("missing sync_block before a write", CSP_BROKEN(blocks_of(kThreads), write_after_read<true>, out),
        [](const auto& in, size_t i) { return 2 * in[i / kThreads * kThreads + (i + 2) % kThreads]; });
  wrong("missing sync_warp", CSP_BROKEN(blocks_of(kThreads), missing_sync_warp<WarpFault::kNothing>, out),
        [](const auto& in, size_t i) { return in[i ^ 31]; });
  wrong("uninitialised shared memory", CSP_BROKEN(blocks_of(kThreads), uninitialised_shared<true>, out),
        [](const auto& in, size_t i) { return in[i / kThreads * kThreads + (i + 1) % kThreads]; });
}

TEST(Harness, WriteAfterRead) {
  expect_violation(
      CSP_BROKEN(blocks_of(kThreads), write_after_read<true>, out),
      {"write_after_read<true>: block (", "of static shared memory values, which thread ",
       "writes byte |reads byte ", "without sync_block between them|without sync_warp between them"});
}

TEST(Harness, MissingSyncWarp) {
  expect_violation(CSP_BROKEN(blocks_of(kThreads), missing_sync_warp<WarpFault::kNothing>, out),
                   {"reads byte ", "nobody has written|without sync_warp between them"});
  expect_violation(CSP_BROKEN(blocks_of(kThreads), missing_sync_warp<WarpFault::kShuffle>, out),
                   {"reads byte ", "without sync_warp between them"});
}

TEST(Harness, BlocksWriteOneElement) {
  expect_violation(CSP_BROKEN(blocks_of(kThreads), blocks_write_one_element<true>, out),
                   {"blocks_write_one_element<true>: block (",
                    "thread 127 at broken_kernels.cuh:", "of out, which block (",
                    "thread 127 wrote at broken_kernels.cuh:", ", and nothing orders these blocks"});
}

TEST(Harness, MissingSyncCluster) {
  const DeviceBuffer between("between", 4 * kElements);
  expect_violation(
      CSP_BROKEN(blocks_of(kThreads, 0, 2), missing_sync_cluster<true>, between.data(), out),
      {"missing_sync_cluster<true>: block (", "of between, which block (|of between, which nobody",
       "without sync_cluster between them|nobody has written"});
}

TEST(Harness, ArenaTakenAgain) {
  expect_violation(CSP_BROKEN(blocks_of(kThreads, 4 * kThreads), arena_taken_again<true>, out),
                   {"arena_taken_again<true>: block (",
                    "of shared memory [0, 256), which|of shared memory [0, 512), which",
                    "without sync_block between them|without sync_warp between them"});
}

TEST(Harness, PlainUpdateOfAtomic) {
  expect_violation(
      [&](const void*, void* out) {
        const DeviceBuffer same = to_device("in", std::vector<int32_t>(kElements, 5));
        const LaunchShape shape = blocks_of(kThreads);
        return CSP_LAUNCH(context_of(), shape, (plain_update_of_atomic<true>), same.data(), out);
      },
      {"byte 20 of static shared memory counts, which ", "atomically updates|reads byte|writes byte",
       "without sync_"});
}

TEST(Harness, ReadonlyMemoryThatIsWritten) {
  expect_violation(CSP_BROKEN(blocks_of(kThreads), readonly_written<true>, out),
                   {"of out as memory that nothing writes, but this kernel wrote it at broken_kernels.cuh:"});
}

// Three readers of two warps, then sync_warp in one: the reader of the other warp must not be forgotten.
template <int kReaders>
CSP_KERNEL(64, 1)
void many_readers(const void* in, void* out) {
  CSP_SHARED(int32_t, value, 1);
  if (thread() == 0) value[0] = 1;
  sync_block();
  int32_t sum = 0;
  for (int turn = 0; turn < kReaders; ++turn) {
    const int reader = turn % 2 == 0 ? turn / 2 : 32 + turn / 2;
    if (thread() == reader) sum += value[0];
    sync_warp();
  }
  if (thread() == 0) value[0] = global<int32_t>(in)[0];
  sync_block();
  global<int32_t>(out)[thread()] = sum + value[0];
}

TEST(Harness, EveryReaderIsRemembered) {
  LaunchShape shape;
  shape.threads = 64;
  EXPECT_EQ(violation_of(CSP_BROKEN(shape, many_readers<1>, out)), "it passed");
  for (uint64_t s = 0; s < kSeeds; ++s) {
    seed(s);
    for (const auto& kernel : {many_readers<2>, many_readers<3>, many_readers<5>}) {
      const std::string message = violation_of(CSP_BROKEN(shape, kernel, out));
      EXPECT_TRUE(contains(message, "writes byte 0 of static shared memory value|reads byte 0")) << message;
      EXPECT_TRUE(contains(message, "without sync_block between them")) << message;
    }
  }
}

// ---- asynchronous copies ----

TEST(Harness, CopyAsync) {
  const LaunchShape shape = blocks_of(kThreads / 4, 4 * kThreads);
  expect_violation(
      CSP_BROKEN(shape, copy_without<CopyFault::kNoWait>, out),
      {"copy_without<CopyFault::kNoWait>: block (", "of shared memory [0, 512) while a copy_async of thread ",
       "at broken_kernels.cuh:", "is under way"});
  expect_violation(CSP_BROKEN(shape, copy_without<CopyFault::kNoCommit>, out),
                   {"of shared memory [0, 512) while a copy_async of thread ", "is under way"});
  expect_violation(CSP_BROKEN(shape, copy_without<CopyFault::kNoSync>, out),
                   {"reads byte ", "nobody has written|without sync_warp between them"});
  expect_violation(CSP_BROKEN(shape, copy_without<CopyFault::kNoSyncBefore>, out),
                   {"copies to byte |reads byte ", "without sync_warp between them|is under way"});
}

CSP_KERNEL(32, 1)
void copy_and_return(const void* in, void*) {
  SharedArena arena;
  const Shared<int32_t> tile = arena.take<int32_t>(128);
  copy_async(tile + 4 * lane(), global<int32_t>(in) + 4 * lane(), true);
  copy_async_commit();
}

CSP_KERNEL(32, 1)
void copy_changing(const void* in, void* out) {
  SharedArena arena;
  const Shared<int32_t> tile = arena.take<int32_t>(128);
  const Global<int32_t> y = global<int32_t>(out) + 4 * lane();
  copy_async(tile + 4 * lane(), y, true);
  copy_async_commit();
  y[2] = global<int32_t>(in)[0] + 5;
  copy_async_wait<0>();
}

CSP_KERNEL(32, 1)
void copy_to_global(const void* in, void* out) {
  copy_async(global<int32_t>(out) + 4 * lane(), global<int32_t>(in) + 4 * lane(), true);
}

TEST(Harness, CopyAsyncToTheEnd) {
  LaunchShape shape;
  shape.threads = 32;
  shape.shared_bytes = 512;
  expect_violation(CSP_BROKEN(shape, copy_and_return, out), {"returns without waiting for its copy_async"});
  expect_violation(CSP_BROKEN(shape, copy_changing, out),
                   {"waits for a copy_async from memory that was written"});
  expect_violation(CSP_BROKEN(shape, copy_to_global, out), {"calls copy_async on out, not on shared memory"});
}

// ---- barriers and collectives ----

TEST(Harness, DivergentBarrier) {
  expect_violation(
      CSP_BROKEN(blocks_of(kThreads), divergent_barrier<true>, out),
      {"divergent_barrier<true>: block (", "thread 70 returns while block (|calls sync_block, but block (",
       "waits at sync_block at broken_kernels.cuh:|thread 70 has returned"});
  expect_violation(
      CSP_BROKEN(blocks_of(kThreads), barrier_in_both_branches<true>, out),
      {"calls sync_block while block (", "waits at sync_block at broken_kernels.cuh:", "in the same warp"});
  expect_violation(CSP_BROKEN(blocks_of(kThreads), early_return<true>, out, int64_t{kElements - 100}),
                   {"returns while block (3, 0, 0) thread |calls sync_block, but block (3, 0, 0) thread ",
                    "waits at sync_block at broken_kernels.cuh:|has returned"});
}

TEST(Harness, DivergentShuffle) {
  expect_violation(
      CSP_BROKEN(blocks_of(kThreads), divergent_shuffle<true>, out),
      {"divergent_shuffle<true>: block (", "waits at shuffle_xor at broken_kernels.cuh:|has returned",
       "returns while|calls shuffle_xor, but"});
}

CSP_KERNEL(64, 1)
void different_barriers(const void* in, void*) {
  if (warp() == 0) {
    sync_block();
  } else if (global<int32_t>(in)[0] == 0) {
    sync_block_count(true);
  }
}

CSP_KERNEL(64, 1)
void waits_for_ever(const void* in, void*) {
  const int32_t here = global<int32_t>(in)[block_x()];
  if (here % 2 == 0 || warp() == 0) sync_cluster();
  if (here % 2 == 1 && warp() == 1) sync_block();
}

TEST(Harness, DifferentBarriers) {
  LaunchShape shape;
  shape.threads = 64;
  expect_violation(CSP_BROKEN(shape, different_barriers, out),
                   {"calls sync_block_count while block (0, 0, 0) thread |calls sync_block while",
                    "waits at sync_block at harness_test.cpp|waits at sync_block_count at harness_test.cpp"});
  shape.x = shape.cluster = 2;
  expect_violation(CSP_BROKEN(shape, waits_for_ever, out),
                   {"waits_for_ever: block (0, 0, 0) thread 0 waits at sync_cluster at harness_test.cpp:",
                    "for ever, while block (1, 0, 0) thread 32 waits at sync_block at harness_test.cpp:"});
}

TEST(Harness, LdmatrixRows) {
  LaunchShape shape;
  shape.threads = 32;
  shape.shared_bytes = 16 * 24 * 2;
  expect_violation(CSP_BROKEN(shape, ldmatrix_rows<true>, out),
                   {"reads 16 bytes at byte ", "of shared memory [0, 640), not aligned to 16 bytes"});
}

// ---- what the device has ----

CSP_KERNEL(32, 1)
void uses_tensor_cores(const void*, void*) {
  float d[4] = {};
  const uint32_t a[4] = {};
  mma_m16n8k16<Half>(d, a, 0, 0);
}

TEST(Harness, Capability) {
  LaunchShape shape;
  shape.threads = 32;
  EXPECT_EQ(
      violation_of([&](auto... p) { return CSP_LAUNCH(context_of(80), shape, uses_tensor_cores, p...); }),
      "it passed");
  expect_violation([&](auto... p) { return CSP_LAUNCH(context_of(75), shape, uses_tensor_cores, p...); },
                   {"calls mma_m16n8k16, which needs sm_80, on sm_75"});
  shape.cluster = shape.x = 2;
  EXPECT_EQ(
      violation_of([&](auto... p) { return CSP_LAUNCH(context_of(80), shape, uses_tensor_cores, p...); }),
      "it was not launched");
}

TEST(Harness, RefusesTheLaunchesThatCudaRefuses) {
  const uint32_t before = launches();
  const auto launch_as = [](auto change) {
    LaunchShape shape = blocks_of(32);
    change(shape);
    return violation_of([&](auto... p) { return CSP_LAUNCH(context_of(), shape, uses_tensor_cores, p...); });
  };
  const std::string refused = "it was not launched";
  EXPECT_EQ(launch_as([](LaunchShape& shape) { shape.x = 0; }), refused);
  EXPECT_EQ(launch_as([](LaunchShape& shape) { shape.y = 1 << 16; }), refused);
  EXPECT_EQ(launch_as([](LaunchShape& shape) { shape.z = 1 << 16; }), refused);
  EXPECT_EQ(launch_as([](LaunchShape& shape) { shape.threads = 1056; }), refused);
  EXPECT_EQ(launch_as([](LaunchShape& shape) { shape.x = 3, shape.cluster = 2; }), refused);
  EXPECT_EQ(launches(), before);
  EXPECT_EQ(launch_as([](LaunchShape&) {}), "it passed");
  EXPECT_EQ(launches(), before + 1);
  EXPECT_TRUE(contains(launch_as([](LaunchShape& shape) { shape.threads = 33; }),
                       "uses_tensor_cores: 33 threads are not whole warps"));
}

// ---- the harness itself ----

// Objects on the stacks of threads that never come to their end are destroyed all the same.
struct Counted {
  static inline int alive = 0;
  Counted() { ++alive; }
  ~Counted() { --alive; }
};

CSP_KERNEL(64, 1)
void fails_in_the_middle(const void* in, void* out) {
  const Counted counted;
  const int32_t value = global<int32_t>(in)[thread()];
  sync_block();
  if (thread() == 40) global<int32_t>(out)[-1] = value;
  sync_block();
}

CSP_KERNEL(64, 1)
void throws(const void* in, void*) {
  const int32_t value = global<int32_t>(in)[0];
  if (thread() == 7) throw std::runtime_error("from inside");
  if (value == 0) sync_block();
}

TEST(Harness, GoesOnAfterAViolation) {
  LaunchShape shape = blocks_of(64);
  for (uint64_t s = 0; s < 50; ++s) {
    seed(s);
    EXPECT_TRUE(contains(violation_of(CSP_BROKEN(shape, fails_in_the_middle, out)),
                         "writes 4 bytes at byte -4 of out|of out, which block ("));
    EXPECT_EQ(Counted::alive, 0);
    EXPECT_EQ(violation_of(CSP_BROKEN(blocks_of(kThreads), write_after_read<false>, out)), "it passed");
  }
  const DeviceBuffer in = to_device("in", std::vector<int32_t>(1));
  EXPECT_THROW(CSP_LAUNCH(context_of(), shape, throws, in.data(), nullptr), std::runtime_error);
  EXPECT_EQ(violation_of(CSP_BROKEN(blocks_of(kThreads), write_after_read<false>, out)), "it passed");
}

CSP_KERNEL(64, 1)
void first_come(const void*, void* out) {
  const int32_t place = atomic_add(global<int32_t>(out), 1);
  global<int32_t>(out)[1 + place] = static_cast<int32_t>(64 * block_x() + thread());
}

std::vector<int32_t> order_of(uint64_t s) {
  seed(s);
  const DeviceBuffer out = to_device("out", std::vector<int32_t>(1 + 64 * kBlocks));
  expect_ok(CSP_LAUNCH(context_of(), blocks_of(64), first_come, nullptr, out.data()));
  return out.values<int32_t>();
}

TEST(Harness, TheSeedIsTheOrder) {
  std::set<std::vector<int32_t>> orders;
  for (uint64_t s = 0; s < kSeeds; ++s) {
    orders.insert(order_of(s));
    EXPECT_EQ(order_of(s), order_of(s));
  }
  EXPECT_EQ(orders.size(), size_t{kSeeds});
}

template <typename T>
CSP_DEVICE void put(T value) {
  CSP_SHARED(T, slot, 1);
  if (thread() == 0) slot[0] = value;
}

CSP_KERNEL(32, 1)
void two_instantiations(const void* in, void* out) {
  const int32_t x = global<int32_t>(in)[1];
  put<int32_t>(x);
  put<float>(2.0f);
  CSP_SHARED(int32_t, noise, 64);
  SharedArena arena;
  const Shared<int32_t> more = arena.take<int32_t>(64);
  for (int i = 0; i < 64 && thread() == 0; ++i) {
    global<int32_t>(out)[128 * block_x() + i] = noise[i];
    global<int32_t>(out)[128 * block_x() + 64 + i] = more[i];
  }
}

TEST(Harness, StaticMemoryIsByInstantiationAndNoiseIsNoise) {
  const Unchecked unchecked;
  std::set<int32_t> values;
  for (uint64_t s = 0; s < kSeeds; ++s) {
    seed(s);
    const DeviceBuffer in = to_device("in", std::vector<int32_t>(2)), out("out", 4 * 128 * kBlocks);
    expect_ok(CSP_LAUNCH(context_of(), blocks_of(32, 256), two_instantiations, in.data(), out.data()));
    for (const int32_t value : out.values<int32_t>()) values.insert(value);
  }
  EXPECT_GT(values.size(), size_t{128 * kBlocks * kSeeds - 10});
}

struct Pair {
  int16_t first, second;
};

CSP_KERNEL(32, 1)
void references(const void* in, void* out) {
  const Global<const int32_t> x = global<int32_t>(in);
  const Global<int32_t> y = global<int32_t>(out) + 16 * block_x();
  if (thread() > 0) return;
  y[0] = x[3];
  y[1] = y[2] = x[4];
  y[3] = x[y[0]] + x[x[5]];
  y[4] = x[1] < x[2] ? x[6] : y[0];
  y[5] = (x[1] < x[2] ? y[0] : y[1]) + 1;
  y[6] = x[7] == x[7] ? -1 : -2;
  y[7] = 0;
  y[7] += x[8];
  y[7] -= x[2];
  y[7] |= x[1];
  *(y + 8) = *(x + 9);
  const int32_t kept = y[0];
  y[0] = y[1];
  y[1] = kept;
  const Global<Pair> pairs = as<Pair>(y + 9);
  pairs[0] = Pair{1, 2};
  const Pair pair = pairs[0];
  y[10] = pair.second;
  as<float>(y)[11] = static_cast<float>(x[2]) / 4;
  const Global<const int32_t> none = nullptr;
  y[12] = none == nullptr;
}

TEST(Harness, References) {
  std::vector<int32_t> numbers(32);
  std::iota(numbers.begin(), numbers.end(), 0);
  const DeviceBuffer in = to_device("in", numbers), out("out", 64 * kBlocks);
  expect_ok(CSP_LAUNCH(context_of(), blocks_of(32), references, in.data(), out.data()));
  const std::vector<int32_t> got = out.values<int32_t>();
  const std::vector<int32_t> want{4, 3, 4, 8, 6, 4, -1, (8 - 2) | 1, 9, 1 | 2 << 16, 2, 0x3f000000, 1};
  EXPECT_EQ(std::vector<int32_t>(got.begin(), got.begin() + 13), want);
}

CSP_KERNEL(256, 1)
void reads_and_barriers(const void* in, void* out, int64_t size, int rounds) {
  CSP_SHARED(float, sums, 256);
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int64_t i = block_x() * 256 + thread(); i < size; i += grid_x() * 256) sum += global<float>(in)[i];
    sums[thread()] = sum;
    sync_block();
    sum = sums[(thread() + 1) % 256];
    sync_block();
  }
  global<float>(out)[block_x() * 256 + thread()] = sum;
}

// Prints; the machine decides how long it takes.
TEST(Harness, WhatItCosts) {
  constexpr int64_t kSize = 1 << 18, kRows = 16;
  const DeviceBuffer in = to_device("in", std::vector<float>(kSize, 1.0f)), out("out", 4 * 256 * kRows);
  LaunchShape shape;
  shape.x = kRows;
  const auto seconds_of = [&](int64_t size, int rounds) {
    const std::clock_t begin = std::clock();
    expect_ok(CSP_LAUNCH(context_of(), shape, reads_and_barriers, in.data(), out.data(), size, rounds));
    return static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  };
  const double barriers = seconds_of(0, 40);
  const double reads = seconds_of(kSize, 40) - barriers;
  EXPECT_EQ(out.values<float>(), std::vector<float>(256 * kRows, 40.0f * kSize / (256 * kRows)));
  std::cout << "  " << reads * 1e9 / (40 * kSize) << " ns per read, "
            << barriers * 1e9 / (2 * 40 * 256 * kRows) << " ns per thread and barrier\n";
}

// What is kept in `auto` would be read later than on a GPU, so it cannot be read.
using Kept = decltype(std::declval<const Global<const float>&>()[0])&;
static_assert(!std::is_convertible_v<Kept, float>);
static_assert(std::is_convertible_v<decltype(std::declval<const Global<const float>&>()[0]), float>);

}  // namespace
}  // namespace csp::test
