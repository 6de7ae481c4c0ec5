#include <type_traits>

#include "segmented_column_sum_plan.h"
#include "simt.cuh"

namespace csp {
namespace {

using namespace simt;

constexpr int kThreads = 32 * kColumnSumWarps;

struct SumArguments {
  const void* attn;
  const int8_t* query_modality;
  const int8_t* key_modality;
  float* self;  // [splits, B, H, N]
  float* cross;
  Strides stride;
  int64_t window;
  int64_t keys;
  int64_t split_rows;
  uint32_t tiles;
  uint32_t num_heads;
  uint32_t heads;  // B * H
};

// The columns of a block: a vector of kWidth for each lane, or two of them where vectors are shorter than 16
// bytes.
template <typename T, int kWidth>
struct Tile {
  static constexpr bool kFull = kWidth * sizeof(T) == 16;
  static constexpr int kPieces = kFull ? 1 : 2;
  static constexpr int kPieceColumns = 32 * kWidth;
  static constexpr int kColumns = kPieces * kPieceColumns;

  // Each column's place in shared memory. Neighbours lie a pitch apart so that a warp meets every bank once,
  // both when lane after lane writes its own columns and when column after column is read.
  static constexpr int kPitch = kWidth > 1 ? 32 + 32 / kWidth : 32;
  static constexpr int kPlaces = kPieces * kWidth * kPitch;
  CSP_DEVICE static int place(int column) {
    const int piece = column / kPieceColumns, owner = column / kWidth % 32;
    return (piece * kWidth + column % kWidth) * kPitch + owner;
  }
};

template <typename T, int kWidth>
struct Sums {
  float self[Tile<T, kWidth>::kPieces][kWidth] = {};
  float cross[Tile<T, kWidth>::kPieces][kWidth] = {};
};

// A vector as it stands in memory until it is added: as floats the vectors on the way would not fit.
template <typename T, int kWidth>
struct Packed {
  using Word = std::conditional_t<sizeof(T) * kWidth >= sizeof(uint32_t), uint32_t, T>;
  static constexpr int kWords = sizeof(T) * kWidth / sizeof(Word);
  Vec<Word, kWords> words{};

  CSP_DEVICE void load(Global<const T> from) { words = load_streaming<kWords>(as<Word>(from)); }
  CSP_DEVICE float operator[](int e) const {
    if constexpr (std::is_same_v<Word, T>) {
      return to_float(words[e]);
    } else if constexpr (sizeof(T) == sizeof(Word)) {
      return bits_float(words[e]);
    } else {
      return unpack2<T>(words[e / 2])[e % 2];
    }
  }
};

// Adds a group of rows to this thread's columns. `attn` and `key_modality` point to the first of these
// columns, `columns` are left from there on; rows of a negative modality are not read.
template <typename T, int kWidth>
CSP_DEVICE void add_group(Sums<T, kWidth>& sums, Global<const T> attn, int64_t row_stride,
                          Shared<const int8_t> query_modality, Shared<const int8_t> key_modality,
                          int64_t columns) {
  using Tile = Tile<T, kWidth>;
  constexpr int kRows = kColumnSumGroup;
  const Vec<int8_t, kRows> query = load_vec<kRows>(query_modality);
  Packed<T, kWidth> x[kRows][Tile::kPieces];
  CSP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CSP_UNROLL
    for (int p = 0; p < Tile::kPieces; ++p) {
      if (query[r] >= 0 && p * Tile::kPieceColumns < columns)
        x[r][p].load(attn + (r * row_stride + p * Tile::kPieceColumns));
    }
  }
  CSP_UNROLL
  for (int p = 0; p < Tile::kPieces; ++p) {
    const Vec<int8_t, kWidth> key = load_vec<kWidth>(key_modality + p * Tile::kPieceColumns);
    CSP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CSP_UNROLL
      for (int e = 0; e < kWidth; ++e) {
        const float weight = x[r][p][e];
        if (query[r] == key[e]) {
          sums.self[p][e] += weight;
        } else {
          sums.cross[p][e] += weight;
        }
      }
    }
  }
}

// The sums of one tile of columns over the rows of one split.
template <typename T, int kWidth>
CSP_KERNEL(kThreads, (Tile<T, kWidth>::kFull ? 3 : 4))
void segmented_column_sum_kernel(const SumArguments a) {
  using Tile = Tile<T, kWidth>;
  CSP_SHARED(uint64_t, query_words, kThreads / 8);
  CSP_SHARED(uint64_t, key_words, Tile::kColumns / 8);
  CSP_SHARED(float, places, kColumnSumWarps * 2 * Tile::kPlaces);
  const Shared<int8_t> query_modality = as<int8_t>(Shared<uint64_t>(query_words));
  const Shared<int8_t> key_modality = as<int8_t>(Shared<uint64_t>(key_words));

  const auto block = static_cast<uint32_t>(block_x());
  const int64_t tile = int64_t{block % a.tiles} * Tile::kColumns, columns = a.keys - tile;
  const uint32_t split_head = block / a.tiles;  // of [splits, B, H]
  const uint32_t head_row = split_head % a.heads, batch = head_row / a.num_heads;
  const int64_t begin = (split_head / a.heads) * a.split_rows;
  const int64_t end = begin + a.split_rows < a.window ? begin + a.split_rows : a.window;
  const Global<const T> attn =
      global<T>(a.attn) + (batch * a.stride.batch + (head_row % a.num_heads) * a.stride.head + tile);
  const Global<const int8_t> queries = global<int8_t>(a.query_modality) + batch * a.window;
  const Global<const int8_t> keys = global<int8_t>(a.key_modality) + (batch * a.keys + tile);

  // The modalities of kThreads rows at a time, one per thread; those to come are on the way meanwhile.
  const auto modality_at = [&](int64_t row) { return row < end ? int8_t(queries[row]) : int8_t{-1}; };
  int8_t next = modality_at(begin + thread());
  if (thread() < Tile::kColumns)
    key_modality[thread()] = thread() < columns ? int8_t(keys[thread()]) : int8_t{-1};

  constexpr int kStep = kColumnSumWarps * kColumnSumGroup;
  static_assert(kThreads % kStep == 0,
                "a warp's groups are kStep rows apart, also from one chunk to the next");
  const int own = lane() * kWidth;
  Global<const T> group = attn + ((begin + warp() * kColumnSumGroup) * a.stride.row + own);
  Sums<T, kWidth> sums;
  for (int64_t chunk = begin; chunk < end; chunk += kThreads) {
    query_modality[thread()] = next;
    next = modality_at(chunk + kThreads + thread());
    sync_block();
    const int rows = static_cast<int>(end - chunk < kThreads ? end - chunk : int64_t{kThreads});
    for (int i = warp() * kColumnSumGroup; i < rows; i += kStep, group += kStep * a.stride.row) {
      add_group<T, kWidth>(sums, group, a.stride.row, query_modality + i, key_modality + own, columns - own);
    }
    sync_block();
  }

  CSP_UNROLL
  for (int p = 0; p < Tile::kPieces; ++p) {
    CSP_UNROLL
    for (int e = 0; e < kWidth; ++e) {
      const int place = 2 * warp() * Tile::kPlaces + (p * kWidth + e) * Tile::kPitch + lane();
      places[place] = sums.self[p][e];
      places[place + Tile::kPlaces] = sums.cross[p][e];
    }
  }
  sync_block();
  for (int i = thread(); i < 2 * Tile::kColumns; i += kThreads) {
    const int list = i / Tile::kColumns, column = i % Tile::kColumns;
    if (column >= columns) continue;
    float sum = 0;
    CSP_UNROLL
    for (int w = 0; w < kColumnSumWarps; ++w)
      sum += places[(2 * w + list) * Tile::kPlaces + Tile::place(column)];
    // Whatever stands in a padding column was added up and is dropped here.
    global<float>(list == 0 ? a.self : a.cross)[split_head * a.keys + tile + column] =
        int8_t(key_modality[column]) < 0 ? 0.0f : sum;
  }
}

// Adds up what the splits found: out[i] = the sum of parts[split][i], for both lists.
CSP_KERNEL(kThreads, 4)
void segmented_column_sum_splits(const float* parts, float* self, float* cross, int64_t count, int splits) {
  const int64_t i = block_x() * kThreads + thread();
  if (i >= 2 * count) return;
  const Global<const float> part = global<float>(parts) + (i < count ? i : splits * count + i - count);
  float sum = 0;
  CSP_UNROLL
  for (int s = 0; s < splits; ++s) sum += part[s * count];
  global<float>(i < count ? self : cross)[i < count ? i : i - count] = sum;
}

template <typename T, int kWidth>
CudaStatus launch_width(const CudaContext& context, int64_t splits, SumArguments arguments) {
  const int64_t tiles = ceil_div(arguments.keys, Tile<T, kWidth>::kColumns);
  arguments.tiles = static_cast<uint32_t>(tiles);
  LaunchShape shape;
  shape.x = splits * arguments.heads * tiles;
  shape.threads = kThreads;
  return CSP_LAUNCH(context, shape, (segmented_column_sum_kernel<T, kWidth>), arguments);
}

}  // namespace

CudaStatus segmented_column_sum_cuda(const SegmentedColumnSumParams& p, const CudaContext& context) {
  const SegmentedColumnSumCut cut = segmented_column_sum_cut(p, context.device);
  const CudaStatus room =
      check_workspace(context, segmented_column_sum_cuda_workspace_bytes(p, context.device));
  if (!room.ok()) return room;

  const int64_t count = p.batch * p.num_heads * p.keys;
  auto* const parts = static_cast<float*>(context.workspace);
  auto* const self = static_cast<float*>(p.self);
  auto* const cross = static_cast<float*>(p.cross);
  SumArguments arguments;
  arguments.attn = p.attn;
  arguments.query_modality = p.query_modality;
  arguments.key_modality = p.key_modality;
  arguments.self = cut.splits > 1 ? parts : self;
  arguments.cross = cut.splits > 1 ? parts + cut.splits * count : cross;
  arguments.stride = p.attn_stride;
  arguments.window = p.window;
  arguments.keys = p.keys;
  arguments.split_rows = cut.rows;
  arguments.num_heads = static_cast<uint32_t>(p.num_heads);
  arguments.heads = static_cast<uint32_t>(p.batch * p.num_heads);
  const int width = segmented_column_sum_width(p);
  const CudaStatus status = with_element(p.dtype, [&](auto tag) -> CudaStatus {
    using T = typename decltype(tag)::type;
    if (count == 0) return {};
    if (width == 16 / sizeof(T)) return launch_width<T, 16 / sizeof(T)>(context, cut.splits, arguments);
    if (width == 4 / sizeof(T)) return launch_width<T, 4 / sizeof(T)>(context, cut.splits, arguments);
    return launch_width<T, 1>(context, cut.splits, arguments);
  });
  if (!status.ok() || cut.splits <= 1) return status;

  LaunchShape shape;
  shape.x = ceil_div(2 * count, kThreads);
  shape.threads = kThreads;
  return CSP_LAUNCH(context, shape, segmented_column_sum_splits, parts, self, cross, count,
                    static_cast<int>(cut.splits));
}

}  // namespace csp
