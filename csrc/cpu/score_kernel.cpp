#include "score_kernel.h"

#include "score_bf16.h"
#include "score_f64.h"
#include "score_tile.h"
#include "simd.h"

namespace csp::CSP_ISA {
namespace {

struct Tile {
  vint position[kVecs];  // last key that a row sees
  vint modality[kVecs];  // -1 in lanes without a row
  vfloat lse[kVecs];     // where given
  int64_t limit;         // keys that any row sees
  int64_t common;        // keys that every row sees
};

CSP_INLINE vint every(int32_t x) {
  return x - vint{};
}

// kLanes int8 values as int32.
CSP_INLINE vint load_modality(const int8_t* p) {
  typedef int8_t vbyte __attribute__((vector_size(kLanes)));
  vbyte v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vint);
}

// Packs rows [first, first + count) of the task as [D, 16]. A lane without a row repeats the last row, so
// that it never meets an infinity or NaN that its neighbours do not; its weight is zero.
template <typename T>
Tile pack_tile(const ScoreParams& p, const ScorePlan& plan, const ScoreScratch& s, int64_t b, int64_t kv_head,
               int64_t first, int64_t count) {
  Tile tile;
  tile.limit = 0;
  tile.common = p.keys;
  for (int lane = 0; lane < kRows; ++lane) {
    const int64_t row = first + (lane < count ? lane : count - 1);
    const int64_t i = s.order[row / plan.group];
    const int64_t head = kv_head * plan.group + row % plan.group;
    const T* query = static_cast<const T*>(p.query) + b * p.query_stride.batch + head * p.query_stride.head +
                     i * p.query_stride.row;
    if (plan.bf16_dot) {
      uint32_t* const packed = static_cast<uint32_t*>(s.query);
      for (int64_t d = 0; d < p.head_dim; d += 2) {
        __builtin_memcpy(packed + d / 2 * kRows + lane, query + d, sizeof(uint32_t));
      }
    } else {
      float* const packed = static_cast<float*>(s.query);
      for (int64_t d = 0; d < p.head_dim; ++d) packed[d * kRows + lane] = to_float(query[d]);
    }

    const int64_t seen = p.causal ? p.keys - p.window + i + 1 : p.keys;
    tile.limit = seen > tile.limit ? seen : tile.limit;
    tile.common = seen < tile.common ? seen : tile.common;
    const int v = lane / kLanes;
    tile.position[v][lane % kLanes] = static_cast<int32_t>(seen - 1);
    tile.modality[v][lane % kLanes] = lane < count ? p.query_modality[b * p.window + i] : -1;
    if (p.lse != nullptr) {
      const int64_t at = (b * p.num_heads + head) * p.window + i;
      tile.lse[v][lane % kLanes] = static_cast<const float*>(p.lse)[at];
    }
  }
  return tile;
}

// -inf where the row may not see the key.
void hide_keys(const Tile& tile, const int8_t* modality, int64_t begin, float* z) {
  for (int k = 0; k < kBlock; ++k) {
    const vint key = every(modality[k] < 0 ? INT32_MAX : static_cast<int32_t>(begin + k));
    for (int v = 0; v < kVecs; ++v) {
      float* at = z + k * kRows + v * kLanes;
      store(at, blend(key > tile.position[v], set1(-kInf), load(at)));
    }
  }
}

// Adds the weighted column sums of one block to self and cross, modality by modality of the tile's rows.
void add_columns(const Tile& tile, const float* e, const vfloat* weight, const int8_t* modality,
                 int64_t count, float* self, float* cross) {
  int32_t last = -1;
  for (int lane = 0; lane < kRows; ++lane) {
    const int32_t wanted = tile.modality[lane / kLanes][lane % kLanes];
    // Rows are sorted, and lanes without one come last.
    if (wanted == last) continue;
    if (wanted < 0) break;
    last = wanted;
    vfloat own[kVecs];
    for (int v = 0; v < kVecs; ++v) own[v] = blend(tile.modality[v] == every(wanted), weight[v], vfloat{});
    for (int64_t k = 0; k < count; k += kLanes) {
      const vfloat sums = column_sums(e + k * kRows, own);
      const vint of = load_modality(modality + k);
      const vint same = of == every(wanted);
      // Padding gets nothing, not even 0 * nan.
      const vint other = (of != every(wanted)) & (of >= 0);
      store_n(self + k, load_n(self + k, count - k, 0) + blend(same, sums, vfloat{}), count - k);
      store_n(cross + k, load_n(cross + k, count - k, 0) + blend(other, sums, vfloat{}), count - k);
    }
  }
}

// Logits of the block of keys at `begin`; -inf where a row may not see the key.
template <typename T>
void logits_of(const ScoreParams& p, const ScorePlan& plan, const ScoreScratch& s, const Tile& tile,
               const T* keys, int64_t begin, float* z) {
  const int64_t stride = p.key_stride.row;
  const int64_t count = tile.limit - begin < kBlock ? tile.limit - begin : kBlock;
  const float scale = static_cast<float>(p.scale);
  bool done = false;
  if constexpr (kHasPairs<T>) {
    if (plan.bf16_dot) {
      block_logits_pairs(static_cast<const uint32_t*>(s.query), keys + begin * stride, stride, p.head_dim,
                         count, scale, static_cast<T*>(s.keys), z);
      done = true;
    }
  }
  if (!done) {
    block_logits(static_cast<const float*>(s.query), keys + begin * stride, stride, p.head_dim, count, scale,
                 static_cast<float*>(s.keys), z);
  }
  if (begin + kBlock > tile.common || s.real[begin / kBlock] < kBlock) {
    hide_keys(tile, s.modality + begin, begin, z);
  }
}

// One tile against every key: logits, exponentials, column sums.
template <typename T>
void score_tile(const ScoreParams& p, const ScorePlan& plan, const ScoreScratch& s, const Tile& tile,
                const T* keys, float* self, float* cross) {
  const float mean = static_cast<float>(plan.mean);
  const float log_n = p.n > 0 ? static_cast<float>(__builtin_log(p.n)) : -kInf;
  float* const z = static_cast<float*>(s.tile);
  const auto add = [&](int64_t begin, const float* e, const vfloat* weight) {
    const int64_t count = tile.limit - begin < kBlock ? tile.limit - begin : kBlock;
    add_columns(tile, e, weight, s.modality + begin, count, self + begin, cross + begin);
  };

  if (p.lse != nullptr) {
    // The normaliser is known: a block is added up at once.
    vfloat weight[kVecs], lse[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      // A row that sees nothing weighs zero; -inf - -inf would make that 0 * nan.
      const vint blind = tile.lse[v] == set1(-kInf);
      lse[v] = blend(blind, vfloat{}, tile.lse[v]);
      weight[v] = blend(blind, vfloat{}, mean / (1.0f + vexp(vmin(set1(88.0f), log_n - lse[v]))));
    }
    for (int64_t begin = 0; begin < tile.limit; begin += kBlock) {
      if (s.real[begin / kBlock] == 0) continue;
      logits_of(p, plan, s, tile, keys, begin, z);
      for (int64_t k = 0; k < kBlock; ++k) {
        for (int v = 0; v < kVecs; ++v) {
          float* at = z + k * kRows + v * kLanes;
          store(at, vexp(vmin(set1(88.0f), load(at) - lse[v])));
        }
      }
      add(begin, z, weight);
    }
    return;
  }

  // Exponentials relative to each block's own maximum, while the block is in the first cache.
  vfloat top[kVecs], sum[kVecs] = {};
  for (int v = 0; v < kVecs; ++v) top[v] = set1(log_n > kLowest ? log_n : kLowest);
  for (int64_t begin = 0; begin < tile.limit; begin += kBlock) {
    if (s.real[begin / kBlock] == 0) continue;
    float* const block = z + begin * kRows;
    float* const tops = s.tops + begin / kBlock * kRows;
    logits_of(p, plan, s, tile, keys, begin, block);
    block_exponentials(block, tops, s.sums + begin / kBlock * kRows);
    for (int v = 0; v < kVecs; ++v) top[v] = vmax(load(tops + v * kLanes), top[v]);
  }
  // Row weights: 1 / (n + sum), all relative to the row's maximum (or log n).
  for (int v = 0; v < kVecs; ++v) sum[v] = vexp(log_n - top[v]);
  for (int64_t begin = 0; begin < tile.limit; begin += kBlock) {
    if (s.real[begin / kBlock] == 0) continue;
    for (int v = 0; v < kVecs; ++v) {
      float* const at = s.tops + begin / kBlock * kRows + v * kLanes;
      const vfloat factor = vexp(load(at) - top[v]);
      sum[v] += load(s.sums + begin / kBlock * kRows + v * kLanes) * factor;
      store(at, factor);
    }
  }
  for (int v = 0; v < kVecs; ++v) sum[v] = blend(sum[v] == vfloat{}, vfloat{}, mean / sum[v]);
  for (int64_t begin = 0; begin < tile.limit; begin += kBlock) {
    if (s.real[begin / kBlock] == 0) continue;
    vfloat weight[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      weight[v] = load(s.tops + begin / kBlock * kRows + v * kLanes) * sum[v];
    }
    add(begin, z + begin * kRows, weight);
  }
}

// Copies the keys' modality, padded to whole blocks, and counts the real keys of each block.
void prepare_keys(const int8_t* modality, int64_t keys, int64_t padded_keys, const ScoreScratch& s) {
  __builtin_memcpy(s.modality, modality, keys);
  __builtin_memset(s.modality + keys, -1, padded_keys - keys);
  for (int64_t begin = 0; begin < padded_keys; begin += kBlock) {
    int32_t count = 0;
    for (int k = 0; k < kBlock; ++k) count += s.modality[begin + k] >= 0;
    s.real[begin / kBlock] = static_cast<int8_t>(count);
  }
}

// Lists the observing queries by modality, so that most tiles hold a single one; returns their number.
int64_t sort_queries(const int8_t* modality, int64_t window, int32_t* order) {
  int64_t place[129] = {};
  for (int64_t i = 0; i < window; ++i) {
    if (modality[i] >= 0) ++place[modality[i] + 1];
  }
  for (int m = 0; m < 128; ++m) place[m + 1] += place[m];
  for (int64_t i = 0; i < window; ++i) {
    if (modality[i] >= 0) order[place[modality[i]]++] = static_cast<int32_t>(i);
  }
  return place[128];
}

template <typename T>
void chunk_of(const ScoreParams& p, const ScorePlan& plan, int64_t b, int64_t kv_head, int64_t begin,
              int64_t end, const ScoreScratch& s, float* self, float* cross) {
  const T* keys = static_cast<const T*>(p.key) + b * p.key_stride.batch + kv_head * p.key_stride.head;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = end - row < kRows ? end - row : kRows;
    const Tile tile = pack_tile<T>(p, plan, s, b, kv_head, row, count);
    score_tile(p, plan, s, tile, keys, self, cross);
  }
}

template <typename T>
void reduce_of(const ScoreParams& p, const ScorePlan& plan, int64_t row, const T* partials, int64_t begin,
               int64_t end) {
  T* const outs[2] = {static_cast<T*>(p.self) + row * p.keys, static_cast<T*>(p.cross) + row * p.keys};
  for (int which = 0; which < 2; ++which) {
    const T* from = partials + which * p.keys;
    for (int64_t j = begin; j < end; ++j) outs[which][j] = from[j];
    for (int64_t part = 1; part < plan.partials; ++part) {
      from += 2 * p.keys;
      for (int64_t j = begin; j < end; ++j) outs[which][j] += from[j];
    }
  }
}

}  // namespace

void score_chunk(const ScoreParams& params, const ScorePlan& plan, int64_t task, const ScoreScratch& scratch,
                 void* self, void* cross) {
  const int64_t row_bytes = params.keys * dtype_bytes(accumulate_dtype(params.dtype));
  __builtin_memset(self, 0, row_bytes);
  __builtin_memset(cross, 0, row_bytes);
  const int64_t head = task / plan.chunks;
  const int64_t b = head / params.num_kv_heads;
  const int64_t kv_head = head % params.num_kv_heads;
  prepare_keys(params.modality + b * params.keys, params.keys, plan.padded_keys, scratch);
  const int8_t* query_modality = params.query_modality + b * params.window;
  const int64_t rows = sort_queries(query_modality, params.window, scratch.order) * plan.group;
  const int64_t begin = task % plan.chunks * plan.chunk_rows;
  const int64_t end = begin + plan.chunk_rows < rows ? begin + plan.chunk_rows : rows;
  float* const self32 = static_cast<float*>(self);
  float* const cross32 = static_cast<float*>(cross);
  switch (params.dtype) {
    case DType::kFloat32:
      return chunk_of<float>(params, plan, b, kv_head, begin, end, scratch, self32, cross32);
    case DType::kFloat16:
      return chunk_of<Float16>(params, plan, b, kv_head, begin, end, scratch, self32, cross32);
    case DType::kBFloat16:
      return chunk_of<BFloat16>(params, plan, b, kv_head, begin, end, scratch, self32, cross32);
    case DType::kFloat64:
      return chunk_f64(params, plan, b, kv_head, begin, end, scratch, static_cast<double*>(self),
                       static_cast<double*>(cross));
  }
}

void score_reduce(const ScoreParams& params, const ScorePlan& plan, int64_t row, const void* partials,
                  int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat64) {
    return reduce_of(params, plan, row, static_cast<const double*>(partials), begin, end);
  }
  reduce_of(params, plan, row, static_cast<const float*>(partials), begin, end);
}

}  // namespace csp::CSP_ISA
