#pragma once

#include "simt.cuh"

// Kernels with one fault each, and without it: kernel<true> must be refused by the harness, kernel<false> is
// right. `in` and `out` are int32 except where said; one block is kThreads threads, thread i of the grid is
// element i.
namespace csp::test {

using namespace simt;

constexpr int kThreads = 128;

CSP_DEVICE int64_t element() {
  return block_x() * kThreads + thread();
}
CSP_DEVICE int neighbour() {
  return (thread() + 1) % kThreads;
}

// out[block] = the sum of the block's elements.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void missing_sync_block(const void* in, void* out) {
  CSP_SHARED(int32_t, sums, kThreads);
  sums[thread()] = global<int32_t>(in)[element()];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (!kBroken || half != 32) sync_block();
    if (thread() < half) sums[thread()] += sums[thread() + half];
  }
  if (thread() == 0) global<int32_t>(out)[block_x()] = sums[0];
}

// out[i] = in[i] + in[i + 1], where there is one.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void read_past_the_end(const void* in, void* out, int64_t size) {
  const Global<const int32_t> x = global<int32_t>(in);
  int32_t sum = x[element()];
  if (element() + 1 < size + kBroken) sum += x[element() + 1];
  global<int32_t>(out)[element()] = sum;
}

// The block's elements, moved on by one.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void write_past_the_end(const void* in, void* out) {
  CSP_SHARED(int32_t, moved, kThreads);
  moved[kBroken ? thread() + 1 : neighbour()] = global<int32_t>(in)[element()];
  sync_block();
  global<int32_t>(out)[element()] = moved[thread()];
}

// The block's elements, four from each thread's right neighbour, by asynchronous copies. kThreads / 4
// threads.
enum class CopyFault { kNone, kNoWait, kNoCommit, kNoSync, kNoSyncBefore };
template <CopyFault kFault>
CSP_KERNEL(kThreads / 4, 1)
void copy_without(const void* in, void* out) {
  constexpr int kCopies = kThreads / 4;
  SharedArena arena;
  const Shared<int32_t> tile = arena.take<int32_t>(kThreads);
  const Global<const int32_t> x = global<int32_t>(in) + block_x() * kThreads;
  const Global<int32_t> y = global<int32_t>(out) + block_x() * kThreads;
  const int right = (thread() + 1) % kCopies;
  for (int round = 0; round < 2; ++round) {
    copy_async(tile + 4 * thread(), x + 4 * thread(), true);
    if (kFault != CopyFault::kNoCommit) copy_async_commit();
    if (kFault != CopyFault::kNoWait) copy_async_wait<0>();
    if (kFault != CopyFault::kNoSync) sync_block();
    const Vec<int32_t, 4> values = load_vec<4>(tile + 4 * right);
    store_vec<4>(y + 4 * thread(), values);
    if (kFault != CopyFault::kNoSyncBefore) sync_block();
  }
}

template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void divergent_barrier(const void* in, void* out) {
  global<int32_t>(out)[element()] = global<int32_t>(in)[element()];
  if (!kBroken || thread() != 70) sync_block();
}

// All threads come to a barrier, but the lanes of a warp not to the same one.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void barrier_in_both_branches(const void* in, void* out) {
  CSP_SHARED(int32_t, values, kThreads);
  values[thread()] = global<int32_t>(in)[element()];
  if ((kBroken ? thread() : warp()) % 2 == 0) {
    sync_block();
  } else {
    sync_block();
  }
  global<int32_t>(out)[element()] = values[neighbour()];
}

// A warp that has nothing to do leaves before the barrier.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void early_return(const void* in, void* out, int64_t size) {
  CSP_SHARED(int32_t, values, kThreads);
  if (kBroken && element() >= size) return;
  values[thread()] = element() < size ? global<int32_t>(in)[element()] : 0;
  sync_block();
  if (element() < size) global<int32_t>(out)[element()] = values[neighbour()];
}

// Pairs of lanes swap their elements.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void divergent_shuffle(const void* in, void* out) {
  int32_t value = global<int32_t>(in)[element()];
  if (!kBroken || lane() < 16) value = shuffle_xor(value, 1);
  global<int32_t>(out)[element()] = value;
}

template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void uninitialised_shared(const void* in, void* out) {
  CSP_SHARED(int32_t, values, kThreads);
  if (!kBroken || thread() != 9) values[thread()] = global<int32_t>(in)[element()];
  sync_block();
  global<int32_t>(out)[element()] = values[neighbour()];
}

// out[block] = the last element of the block.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void blocks_write_one_element(const void* in, void* out) {
  const int64_t place = kBroken ? block_x() / 2 : block_x();
  if (thread() == kThreads - 1) global<int32_t>(out)[place] = global<int32_t>(in)[element()];
}

// Each warp's elements in reverse. A shuffle makes lanes meet, but it orders no memory.
enum class WarpFault { kNone, kNothing, kShuffle };
template <WarpFault kFault>
CSP_KERNEL(kThreads, 1)
void missing_sync_warp(const void* in, void* out) {
  CSP_SHARED(int32_t, values, kThreads);
  const Shared<int32_t> mine = Shared<int32_t>(values) + 32 * warp();
  mine[lane()] = global<int32_t>(in)[element()];
  if (kFault == WarpFault::kNone) sync_warp();
  if (kFault == WarpFault::kShuffle) shuffle(0, 0);
  global<int32_t>(out)[element()] = mine[31 - lane()];
}

// Each element doubled, and moved on by one twice, in place.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void write_after_read(const void* in, void* out) {
  CSP_SHARED(int32_t, values, kThreads);
  values[thread()] = global<int32_t>(in)[element()];
  sync_block();
  const int32_t next = values[neighbour()];
  if (!kBroken) sync_block();
  values[thread()] = 2 * next;
  sync_block();
  global<int32_t>(out)[element()] = values[neighbour()];
}

// Two elements a thread, from in + kBroken on. kThreads / 2 threads.
template <bool kBroken>
CSP_KERNEL(kThreads / 2, 1)
void misaligned_vector(const void* in, void* out) {
  const int64_t first = block_x() * kThreads + 2 * thread();
  if (first + 2 + kBroken > (block_x() + 1) * kThreads) return;
  const Vec<int32_t, 2> values = load_vec<2>(global<int32_t>(in) + first + kBroken);
  store_vec<2>(global<int32_t>(out) + first, values);
}

// The block's elements in reverse, out of the first of two pieces of the dynamic shared memory.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void piece_overrun(const void* in, void* out) {
  SharedArena arena;
  const Shared<int32_t> values = arena.take<int32_t>(kThreads);
  const Shared<int32_t> others = arena.take<int32_t>(kThreads);
  others[thread()] = 0;
  sync_block();
  values[kBroken ? thread() + 1 : thread()] = global<int32_t>(in)[element()];
  sync_block();
  global<int32_t>(out)[element()] = values[kThreads - 1 - thread()] + others[thread()];
}

// The second phase takes the memory of the first for 16-bit numbers.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void arena_taken_again(const void* in, void* out) {
  {
    SharedArena arena;
    const Shared<int32_t> values = arena.take<int32_t>(kThreads);
    values[thread()] = global<int32_t>(in)[element()];
    sync_block();
    global<int32_t>(out)[element()] = values[neighbour()];
  }
  if (!kBroken) sync_block();
  SharedArena arena;
  const Shared<int16_t> small = arena.take<int16_t>(kThreads);
  small[thread()] = static_cast<int16_t>(thread());
  sync_block();
  const int16_t index = small[neighbour()];
  global<int32_t>(out)[element()] += index;
}

// kBytes of static shared memory and kThreads integers of dynamic.
template <int kBytes>
CSP_KERNEL(kThreads, 1)
void shared_memory(const void* in, void* out) {
  CSP_SHARED(int32_t, fixed, kBytes / 4);
  SharedArena arena;
  const Shared<int32_t> values = arena.take<int32_t>(kThreads);
  fixed[thread()] = values[thread()] = global<int32_t>(in)[element()];
  sync_block();
  global<int32_t>(out)[element()] = fixed[neighbour()] + values[neighbour()];
}

// The element of the other block of a cluster of two, by way of `between`.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void missing_sync_cluster(const void* in, void* between, void* out) {
  const Global<int32_t> shared = global<int32_t>(between);
  shared[element()] = global<int32_t>(in)[element()];
  if (kBroken) {
    sync_block();
  } else {
    sync_cluster();
  }
  global<int32_t>(out)[element()] = shared[(block_x() ^ 1) * kThreads + thread()];
}

// A 16 x 16 matrix of halves, loaded transposed and written back. One warp; kBroken: rows of 20 halves.
template <bool kBroken>
CSP_KERNEL(32, 1)
void ldmatrix_rows(const void* in, void* out) {
  constexpr int kStride = kBroken ? 20 : 24;
  SharedArena arena;
  const Shared<Half> tile = arena.take<Half>(16 * kStride);
  for (int i = lane(); i < 256; i += 32) tile[i / 16 * kStride + i % 16] = global<Half>(in)[i];
  sync_warp();
  uint32_t parts[4];
  const int quarter = lane() / 8;
  ldmatrix_transposed(parts, tile + (lane() % 8 + quarter / 2 * 8) * kStride + quarter % 2 * 8);
  // Quarter m of the matrix is now quarter m % 2 * 2 + m / 2 of its transpose.
  for (int m = 0; m < 4; ++m) {
    const int row = m % 2 * 8 + lane() / 4, column = m / 2 * 8 + 2 * (lane() % 4);
    global<uint32_t>(out)[(row * 16 + column) / 2] = parts[m];
  }
}

// out[i] = in[i] + 1, read again through the read-only path.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void readonly_written(const void* in, void* out) {
  const Global<int32_t> y = global<int32_t>(out) + element();
  y[0] = load_readonly<1>(global<int32_t>(in) + element())[0];
  const int32_t value = kBroken ? load_readonly<1>(y)[0] : load_vec<1>(y)[0];
  y[0] = value + 1;
}

// out[v] = how many elements of the grid are v, for 0 <= v < 64; `out` begins as zeros.
template <bool kBroken>
CSP_KERNEL(kThreads, 1)
void plain_update_of_atomic(const void* in, void* out) {
  CSP_SHARED(int32_t, counts, 64);
  if (thread() < 64) counts[thread()] = 0;
  sync_block();
  const int32_t value = global<int32_t>(in)[element()];
  if (kBroken && thread() == 3) {
    counts[value] += 1;
  } else {
    atomic_add(Shared<int32_t>(counts) + value, 1);
  }
  sync_block();
  if (thread() < 64) atomic_add(global<int32_t>(out) + thread(), counts[thread()]);
}

}  // namespace csp::test
