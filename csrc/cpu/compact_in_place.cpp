#include "csp/compact_in_place.h"

#include "compact_kernel.h"
#include "tasks.h"

namespace csp {
namespace {

// One of the two caches, strides in bytes.
struct Cache {
  char* rows;  // [B, Hkv, L, bytes]
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t bytes;
  bool stream;
};

Cache cache_of(const CompactParams& p, void* rows, const Strides& stride, int64_t dim) {
  // As compact_cpu: what is larger than the second-level caches goes past them.
  constexpr int64_t kStreamBytes = 2 << 20;
  const int64_t element = p.element_bytes;
  Cache cache = {static_cast<char*>(rows), stride.batch * element, stride.head * element,
                 stride.row * element,     dim * element,          false};
  const uint64_t places = reinterpret_cast<uintptr_t>(rows) | static_cast<uint64_t>(cache.batch_stride) |
                          static_cast<uint64_t>(cache.head_stride) | static_cast<uint64_t>(cache.row_stride) |
                          static_cast<uint64_t>(cache.bytes);
  cache.stream = places % 64 == 0 && p.batch * p.num_kv_heads * p.budget * cache.bytes >= kStreamBytes;
  return cache;
}

}  // namespace

int64_t compact_in_place_cpu_tasks(const CompactParams& p) {
  return p.budget == 0 ? 0 : 2 * p.batch * p.num_kv_heads;
}

int64_t compact_in_place_cpu_bad_order(const CompactParams& p) {
  const int64_t count = p.batch * p.score_heads * p.budget;
  int32_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (i % p.budget == 0) last = -1;
    if (p.indices[i] < 0) continue;
    if (p.indices[i] <= last) return i;
    last = p.indices[i];
  }
  return -1;
}

void compact_in_place_cpu(const CompactParams& p, const Parallel& parallel) {
  const Cache caches[2] = {cache_of(p, p.key_out, p.key_stride, p.head_dim),
                           cache_of(p, p.value_out, p.value_stride, p.value_dim)};
  const int64_t heads = p.batch * p.num_kv_heads;
  for_each_task(parallel, compact_in_place_cpu_tasks(p), [&](int64_t task, int32_t) {
    const Cache& cache = caches[task / heads];
    if (cache.bytes == 0) return;
    const int64_t batch = task % heads / p.num_kv_heads;
    const int64_t head = task % p.num_kv_heads;
    const int64_t score_row = p.score_heads == 1 ? batch : task % heads;
    const CompactInPlaceHead rows = {cache.rows + batch * cache.batch_stride + head * cache.head_stride,
                                     p.indices + score_row * p.budget,
                                     cache.row_stride,
                                     cache.bytes,
                                     p.keys,
                                     p.budget,
                                     cache.stream};
    CSP_CALL_KERNEL(compact_rows_in_place, rows);
  });
}

}  // namespace csp
