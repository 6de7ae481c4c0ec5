#include "compact_in_place_plan.h"
#include "simt.cuh"

namespace csp {
namespace {

using namespace simt;

// One of the two caches, strides in bytes.
struct Cache {
  void* rows;  // [B, Hkv, L, row]
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  CompactInPlaceCut cut;
};

struct CompactInPlaceArguments {
  const int32_t* indices;  // [B, Hs, T]
  int64_t budget;
  uint32_t keys;  // no more than an index can name
  uint32_t num_kv_heads;
  uint32_t score_heads;
  Cache key;
  Cache value;
};

// One slice of one head, in units of N words of type W.
template <typename W, int N>
class Slice {
 public:
  CSP_DEVICE Slice(const CompactInPlaceArguments& a, const Cache& cache, uint32_t block)
      : cut_(cache.cut), row_stride_(cache.row_stride), keys_(a.keys) {
    const auto slices = static_cast<uint32_t>(cut_.slices);
    const uint32_t head_row = block / slices;  // of [B, Hkv]
    const uint32_t batch = head_row / a.num_kv_heads, head = head_row % a.num_kv_heads;
    const int64_t first_unit = block % slices * cut_.slice_units;
    units_ = static_cast<uint32_t>(cut_.row_units - first_unit);
    rows_ = global<char>(cache.rows) +
            (batch * cache.batch_stride + head * cache.head_stride + first_unit * kBytes);
    indices_ = global<int32_t>(a.indices) + (a.score_heads == 1 ? batch : head_row) * a.budget;
  }

  // What becomes of slots [first, end), a tile at most, where kRight: rows that move right, and free slots;
  // otherwise rows that move left. Returns the last slot of this thread that was left for kRight, or -1.
  template <bool kRight>
  CSP_DEVICE int32_t move_tile(int64_t first, int64_t end) {
    const auto slots = static_cast<uint32_t>(end - first);
    const auto slice_units = static_cast<uint32_t>(cut_.slice_units);
    const auto at = [](int i) { return static_cast<uint32_t>(i * kCompactInPlaceThreads + thread()); };
    const auto slot_of = [&](int i) { return at(i) * cut_.reciprocal >> kCompactShift; };
    const auto unit_of = [&](int i) { return at(i) - slot_of(i) * slice_units; };
    const auto here = [&](int i) { return slot_of(i) < slots && unit_of(i) < units_; };

    uint32_t index[kCompactInPlaceInFlight];  // that of a free slot is larger than any key
    CSP_UNROLL
    for (int i = 0; i < kCompactInPlaceInFlight; ++i)
      index[i] = static_cast<uint32_t>(here(i) ? load_readonly<1>(indices_ + (first + slot_of(i)))[0] : -1);

    int32_t left = -1;
    uint32_t stores = 0;  // a bit for each unit
    Vec<W, N> data[kCompactInPlaceInFlight];
    CSP_UNROLL
    for (int i = 0; i < kCompactInPlaceInFlight; ++i) {
      const auto slot = static_cast<uint32_t>(first) + slot_of(i);
      const bool free = index[i] >= keys_;
      const bool loads = kRight ? index[i] < slot : !free && index[i] > slot;
      if (here(i) && (loads || (kRight && free))) stores |= 1u << i;
      if (here(i) && (free || index[i] < slot)) left = static_cast<int32_t>(slot);
      data[i] = {};
      if (here(i) && loads) data[i] = load_streaming<N>(as<W>(place(index[i], unit_of(i))));
    }
    sync_block();

    CSP_UNROLL
    for (int i = 0; i < kCompactInPlaceInFlight; ++i)
      if (stores >> i & 1) store_vec<N>(as<W>(place(first + slot_of(i), unit_of(i))), data[i]);
    return left;
  }

 private:
  static constexpr int64_t kBytes = sizeof(W) * N;

  CSP_DEVICE Global<char> place(int64_t row, uint32_t unit) const {
    return rows_ + (row * row_stride_ + unit * kBytes);
  }

  const CompactInPlaceCut& cut_;
  int64_t row_stride_;
  uint32_t keys_;
  uint32_t units_;  // of this slice, where that is less than slice_units
  Global<char> rows_;
  Global<const int32_t> indices_;
};

// The order of compact_in_place.h. A tile's stores wait for its own loads only: no later tile reads
// what it wrote. `last` is one word of shared memory.
template <typename W, int N>
CSP_DEVICE void move_slice(const CompactInPlaceArguments& a, const Cache& cache, uint32_t block,
                           Shared<int32_t> last) {
  Slice<W, N> slice(a, cache, block);
  const int64_t step = cache.cut.tile_rows;
  if (thread() == 0) last[0] = -1;
  int32_t mine = -1;
  for (int64_t first = 0; first < a.budget; first += step) {
    const int32_t left =
        slice.template move_tile<false>(first, first + step < a.budget ? first + step : a.budget);
    if (left > mine) mine = left;
  }
  if (mine >= 0) atomic_max(last, mine);
  sync_block();
  for (int64_t end = int64_t{last[0]} + 1; end > 0; end -= step)
    slice.template move_tile<true>(end > step ? end - step : 0, end);
}

CSP_DEVICE void move_cache(const CompactInPlaceArguments& a, const Cache& cache, uint32_t block,
                           Shared<int32_t> last) {
  switch (cache.cut.unit_bytes) {
    case 16:
      return move_slice<uint32_t, 4>(a, cache, block, last);
    case 8:
      return move_slice<uint32_t, 2>(a, cache, block, last);
    case 4:
      return move_slice<uint32_t, 1>(a, cache, block, last);
    case 2:
      return move_slice<uint16_t, 1>(a, cache, block, last);
    default:
      return move_slice<uint8_t, 1>(a, cache, block, last);
  }
}

// Keys first, then values.
CSP_KERNEL(kCompactInPlaceThreads, 4)
void compact_in_place_kernel(const CompactInPlaceArguments a) {
  CSP_SHARED(int32_t, last, 1);
  const auto block = static_cast<uint32_t>(block_x());
  const auto key_blocks = static_cast<uint32_t>(a.key.cut.blocks);
  if (block < key_blocks) {
    move_cache(a, a.key, block, last);
  } else {
    move_cache(a, a.value, block - key_blocks, last);
  }
}

Cache cache_of(const CompactParams& p, void* rows, const Strides& stride, int64_t dim,
               const CudaDevice& device) {
  const int64_t element = p.element_bytes;
  return {rows, stride.batch * element, stride.head * element, stride.row * element,
          compact_in_place_cut(p, rows, stride, dim, device)};
}

}  // namespace

CudaStatus compact_in_place_cuda(const CompactParams& p, const CudaContext& context) {
  constexpr int64_t kMaxKeys = int64_t{1} << 31;
  const CompactInPlaceArguments arguments = {
      p.indices,
      p.budget,
      static_cast<uint32_t>(p.keys < kMaxKeys ? p.keys : kMaxKeys),
      static_cast<uint32_t>(p.num_kv_heads),
      static_cast<uint32_t>(p.score_heads),
      cache_of(p, p.key_out, p.key_stride, p.head_dim, context.device),
      cache_of(p, p.value_out, p.value_stride, p.value_dim, context.device)};
  LaunchShape shape;
  shape.x = arguments.key.cut.blocks + arguments.value.cut.blocks;
  shape.threads = kCompactInPlaceThreads;
  if (shape.x == 0) return {};
  return CSP_LAUNCH(context, shape, compact_in_place_kernel, arguments);
}

}  // namespace csp
