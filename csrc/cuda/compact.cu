#include "compact_plan.h"
#include "simt.cuh"

namespace csp {
namespace {

using namespace simt;

// One of the two caches, strides in bytes.
struct Cache {
  const void* in;  // [B, Hkv, L, row]
  void* out;       // [B, Hkv, T, row], contiguous
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  CompactCut cut;
};

struct CompactArguments {
  const int32_t* indices;  // [B, Hs, T]
  int64_t budget;
  uint32_t keys;  // no more than an index can name
  uint32_t num_kv_heads;
  uint32_t score_heads;
  Cache key;
  Cache value;
};

// Block `block` of one cache in units of N words of type W. The output of a block is contiguous, so threads
// walk it unit by unit, whatever the row length; the indices of all units, then the units, then the stores.
template <typename W, int N>
CSP_DEVICE void copy_block(const CompactArguments& a, const Cache& cache, uint32_t block) {
  constexpr int64_t kBytes = sizeof(W) * N;
  const auto head_blocks = static_cast<uint32_t>(cache.cut.head_blocks);
  const uint32_t head_row = block / head_blocks;  // of [B, Hkv]
  const uint32_t batch = head_row / a.num_kv_heads, head = head_row % a.num_kv_heads;
  const int64_t first = (block % head_blocks) * cache.cut.block_rows;
  const int64_t rows = a.budget - first < cache.cut.block_rows ? a.budget - first : cache.cut.block_rows;
  const int64_t units = rows * cache.cut.row_units;

  const int64_t index_row = a.score_heads == 1 ? batch : head_row;
  const Global<const int32_t> indices = global<int32_t>(a.indices) + (index_row * a.budget + first);
  const Global<const char> in =
      global<char>(cache.in) + (batch * cache.batch_stride + head * cache.head_stride);
  const Global<char> out =
      global<char>(cache.out) + (head_row * a.budget + first) * cache.cut.row_units * kBytes;

  for (int64_t base = 0; base < units; base += kCompactUnits) {
    const auto left =
        static_cast<uint32_t>(units - base < kCompactUnits ? units - base : int64_t{kCompactUnits});
    const auto at = [](int i) { return static_cast<uint32_t>(i * kCompactThreads + thread()); };
    const auto row_of = [&](int i) { return at(i) * cache.cut.reciprocal >> kCompactShift; };

    uint32_t index[kCompactInFlight];  // a negative one is larger than any key
    CSP_UNROLL
    for (int i = 0; i < kCompactInFlight; ++i)
      index[i] = static_cast<uint32_t>(at(i) < left ? load_readonly<1>(indices + row_of(i))[0] : -1);

    Vec<W, N> data[kCompactInFlight];
    CSP_UNROLL
    for (int i = 0; i < kCompactInFlight; ++i) {
      const uint32_t unit = at(i) - row_of(i) * static_cast<uint32_t>(cache.cut.row_units);
      data[i] = {};
      if (index[i] < a.keys)
        data[i] =
            load_streaming<N>(as<W>(in + base * kBytes + (index[i] * cache.row_stride + unit * kBytes)));
    }

    CSP_UNROLL
    for (int i = 0; i < kCompactInFlight; ++i)
      if (at(i) < left) store_vec<N>(as<W>(out + (base + at(i)) * kBytes), data[i]);
  }
}

CSP_DEVICE void copy_cache(const CompactArguments& a, const Cache& cache, uint32_t block) {
  switch (cache.cut.unit_bytes) {
    case 16:
      return copy_block<uint32_t, 4>(a, cache, block);
    case 8:
      return copy_block<uint32_t, 2>(a, cache, block);
    case 4:
      return copy_block<uint32_t, 1>(a, cache, block);
    case 2:
      return copy_block<uint16_t, 1>(a, cache, block);
    default:
      return copy_block<uint8_t, 1>(a, cache, block);
  }
}

// Keys first, then values.
CSP_KERNEL(kCompactThreads, 7)
void compact_kernel(const CompactArguments a) {
  const auto block = static_cast<uint32_t>(block_x());
  const auto key_blocks = static_cast<uint32_t>(a.key.cut.blocks);
  if (block < key_blocks) {
    copy_cache(a, a.key, block);
  } else {
    copy_cache(a, a.value, block - key_blocks);
  }
}

Cache cache_of(const CompactParams& p, const void* in, void* out, const Strides& stride, int64_t dim) {
  const int64_t element = p.element_bytes;
  return {in,
          out,
          stride.batch * element,
          stride.head * element,
          stride.row * element,
          compact_cut(p, in, stride, dim, out)};
}

}  // namespace

CudaStatus compact_cuda(const CompactParams& p, const CudaContext& context) {
  constexpr int64_t kMaxKeys = int64_t{1} << 31;
  const CompactArguments arguments = {p.indices,
                                      p.budget,
                                      static_cast<uint32_t>(p.keys < kMaxKeys ? p.keys : kMaxKeys),
                                      static_cast<uint32_t>(p.num_kv_heads),
                                      static_cast<uint32_t>(p.score_heads),
                                      cache_of(p, p.key, p.key_out, p.key_stride, p.head_dim),
                                      cache_of(p, p.value, p.value_out, p.value_stride, p.value_dim)};
  LaunchShape shape;
  shape.x = arguments.key.cut.blocks + arguments.value.cut.blocks;
  shape.threads = kCompactThreads;
  if (shape.x == 0) return {};
  return CSP_LAUNCH(context, shape, compact_kernel, arguments);
}

}  // namespace csp
