#include "csp/compact.h"

#include <cstring>

#include "tasks.h"

namespace csp {
namespace {

// One of the two caches, in bytes.
struct Cache {
  const char* in;        // [B, Hkv, L, bytes]
  char* out;             // [B, Hkv, T, bytes], contiguous
  int64_t batch_stride;  // of in
  int64_t head_stride;   // of in
  int64_t row_stride;    // of in
  int64_t bytes;         // of one row
};

Cache cache_of(const void* in, void* out, const Strides& stride, int64_t dim, int64_t element) {
  return {static_cast<const char*>(in), static_cast<char*>(out), stride.batch * element,
          stride.head * element,        stride.row * element,    dim * element};
}

// Rows of output per task: large against the hand-over, small against a head of a cache.
int64_t rows_per_task(const CompactParams& p) {
  constexpr int64_t kTaskBytes = 128 << 10;
  const int64_t widest = (p.head_dim > p.value_dim ? p.head_dim : p.value_dim) * p.element_bytes;
  return widest >= kTaskBytes ? 1 : widest > 0 ? kTaskBytes / widest : p.budget;
}

// How far ahead rows are asked for. Kept rows lie scattered, so the hardware sees no pattern: 16 doubled the
// bandwidth of one core, and stores past the cache then gained nothing.
constexpr int64_t kAhead = 16;

void prefetch(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes && i < 1024; i += 64) __builtin_prefetch(row + i);
}

// Rows [begin, end) of one head's output; runs of consecutive indices become one copy.
void copy_rows(const Cache& cache, const char* in, char* out, const int32_t* indices, int64_t keys,
               int64_t begin, int64_t end) {
  const bool packed = cache.row_stride == cache.bytes;
  const auto inside = [&](int64_t t) { return indices[t] >= 0 && indices[t] < keys; };
  for (int64_t t = begin, run = 1; t < end; t += run) {
    run = 1;
    if (t + kAhead < end && inside(t + kAhead)) {
      prefetch(in + indices[t + kAhead] * cache.row_stride, cache.bytes);
    }
    if (!inside(t)) {
      std::memset(out + t * cache.bytes, 0, static_cast<size_t>(cache.bytes));
      continue;
    }
    while (packed && t + run < end && inside(t + run) && indices[t + run] == indices[t] + run) ++run;
    std::memcpy(out + t * cache.bytes, in + indices[t] * cache.row_stride,
                static_cast<size_t>(run * cache.bytes));
  }
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
  const Cache caches[2] = {cache_of(p.key, p.key_out, p.key_stride, p.head_dim, p.element_bytes),
                           cache_of(p.value, p.value_out, p.value_stride, p.value_dim, p.element_bytes)};
  const int64_t step = rows_per_task(p);
  const int64_t rows = p.batch * p.num_kv_heads;
  const int64_t pieces = tasks / (2 * rows);

  for_each_task(parallel, tasks, [&](int64_t task, int32_t) {
    const Cache& cache = caches[task / (rows * pieces)];
    if (cache.bytes == 0) return;
    const int64_t row = task / pieces % rows;
    const int64_t batch = row / p.num_kv_heads;
    const int64_t head = row % p.num_kv_heads;
    const int64_t score_row = p.score_heads == 1 ? batch : row;
    const int64_t begin = task % pieces * step;
    const int64_t end = begin + step < p.budget ? begin + step : p.budget;
    copy_rows(cache, cache.in + batch * cache.batch_stride + head * cache.head_stride,
              cache.out + row * p.budget * cache.bytes, p.indices + score_row * p.budget, p.keys, begin, end);
  });
}

}  // namespace csp
