#include "csp/compact.h"

#include "compact_kernel.h"
#include "tasks.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace csp {
namespace {

// One of the two caches, strides in bytes.
struct Cache {
  const char* in;  // [B, Hkv, L, bytes]
  char* out;       // [B, Hkv, T, bytes], contiguous
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t bytes;
  bool stream;
};

Cache cache_of(const CompactParams& p, const void* in, void* out, const Strides& stride, int64_t dim) {
  // What is larger than the second-level caches would be evicted before it is read, so it goes past them.
  constexpr int64_t kStreamBytes = 2 << 20;
  const int64_t element = p.element_bytes, bytes = dim * element;
  const bool whole_lines = bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const bool large = p.batch * p.num_kv_heads * p.budget * bytes >= kStreamBytes;
  return {static_cast<const char*>(in), static_cast<char*>(out), stride.batch * element,
          stride.head * element,        stride.row * element,    bytes,
          whole_lines && large};
}

// Asks for huge pages where the output is fresh memory: a fault per 2 MiB instead of 512 of them, which cost
// more than the copy itself.
void prefer_huge_pages([[maybe_unused]] const Cache& cache, [[maybe_unused]] int64_t rows) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(cache.out);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + static_cast<uintptr_t>(rows * cache.bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Rows of output per task: large against the hand-over, small against a head of a cache.
int64_t rows_per_task(const CompactParams& p) {
  constexpr int64_t kTaskBytes = 128 << 10;
  const int64_t widest = (p.head_dim > p.value_dim ? p.head_dim : p.value_dim) * p.element_bytes;
  return widest >= kTaskBytes ? 1 : widest > 0 ? kTaskBytes / widest : p.budget;
}

}  // namespace

int64_t compact_cpu_tasks(const CompactParams& p) {
  if (p.batch == 0 || p.num_kv_heads == 0 || p.budget == 0) return 0;
  const int64_t step = rows_per_task(p);
  return 2 * p.batch * p.num_kv_heads * ((p.budget + step - 1) / step);
}

int64_t compact_cpu_bad_index(const CompactParams& p) {
  const int64_t count = p.batch * p.score_heads * p.budget;
  for (int64_t i = 0; i < count; ++i) {
    if (p.indices[i] < -1 || p.indices[i] >= p.keys) return i;
  }
  return -1;
}

void compact_cpu(const CompactParams& p, const Parallel& parallel) {
  const int64_t tasks = compact_cpu_tasks(p);
  if (tasks == 0) return;
  const Cache caches[2] = {cache_of(p, p.key, p.key_out, p.key_stride, p.head_dim),
                           cache_of(p, p.value, p.value_out, p.value_stride, p.value_dim)};
  const int64_t step = rows_per_task(p);
  const int64_t rows = p.batch * p.num_kv_heads;
  const int64_t pieces = tasks / (2 * rows);
  for (const Cache& cache : caches) prefer_huge_pages(cache, rows * p.budget);

  for_each_task(parallel, tasks, [&](int64_t task, int32_t) {
    const Cache& cache = caches[task / (rows * pieces)];
    if (cache.bytes == 0) return;
    const int64_t row = task / pieces % rows;
    const int64_t batch = row / p.num_kv_heads;
    const int64_t head = row % p.num_kv_heads;
    const int64_t score_row = p.score_heads == 1 ? batch : row;
    const int64_t begin = task % pieces * step;
    const int64_t end = begin + step < p.budget ? begin + step : p.budget;
    const CompactHead piece = {cache.in + batch * cache.batch_stride + head * cache.head_stride,
                               cache.out + row * p.budget * cache.bytes,
                               p.indices + score_row * p.budget,
                               cache.row_stride,
                               cache.bytes,
                               p.keys,
                               cache.stream};
    CSP_CALL_KERNEL(compact_rows, piece, begin, end);
  });
}

}  // namespace csp
