#include "decode_kernel.h"

#include "decode_tile.h"
#include "simd.h"

namespace csp::CSP_ISA {
namespace {

// ---- one split ----

// How far ahead of its use a row is fetched: 2 and 4 KiB measured alike, 8 KiB and none clearly slower.
constexpr int64_t kAheadBytes = 4096;

// The rows of a tile as float32, zeros up to a whole vector: heads narrower than one.
template <typename T>
void pack(const T* rows, int64_t step, int64_t keys, int64_t head_dim, float* packed) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t d = 0; d < kLanes; ++d)
      packed[j * kLanes + d] = d < head_dim ? to_float(rows[j * step + d]) : 0;
  }
}

template <typename T>
void load_queries(const DecodeParams& p, const DecodePlan& plan, int64_t b, int64_t h, float* out) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const float scale = static_cast<float>(p.scale);
  const int64_t whole = p.head_dim / kLanes * kLanes;
  for (int64_t r = 0; r < plan.rows; ++r) {
    const T* x = static_cast<const T*>(p.query) + b * p.query_stride.batch +
                 (h * group + r / p.queries) * p.query_stride.head + r % p.queries * p.query_stride.row;
    float* row = out + r * plan.width;
    for (int64_t d = 0; d < plan.width; ++d) row[d] = 0;
    for (int64_t d = 0; d < whole; ++d) row[d] = to_float(x[d]) * scale;
    // The overlapping vector: its last lanes carry what is left.
    const int64_t shift = p.head_dim > kLanes && whole < p.head_dim ? kLanes - (p.head_dim - whole) : 0;
    for (int64_t d = whole; d < p.head_dim; ++d) row[d + shift] = to_float(x[d]) * scale;
  }
}

template <typename T>
void split_of(const DecodeParams& p, const DecodePlan& plan, int64_t task, const DecodeRange& range,
              float* partial, float* scratch) {
  float* const tops = partial;
  float* const sums = tops + plan.rows;
  float* const acc = sums + plan.rows;
  const int64_t begin = range.begin + task % plan.splits * plan.split;
  const int64_t end = begin + plan.split < range.end ? begin + plan.split : range.end;
  if (begin >= end) {
    for (int64_t r = 0; r < plan.rows; ++r) tops[r] = -kInf;
    return;
  }

  const int64_t head = task / plan.splits, b = head / p.num_kv_heads, h = head % p.num_kv_heads;
  const T* const key = static_cast<const T*>(p.key) + b * p.key_stride.batch + h * p.key_stride.head;
  const T* const value = static_cast<const T*>(p.value) + b * p.value_stride.batch + h * p.value_stride.head;
  float* const queries = scratch;
  float* const lane_tops = queries + plan.rows * plan.width;
  float* const lane_sums = lane_tops + plan.rows * 16;
  float* const logits = lane_sums + plan.rows * 16;
  float* const packed = logits + 8 * kDecodeTile;
  load_queries<T>(p, plan, b, h, queries);
  for (int64_t i = 0; i < plan.rows * 16; ++i) lane_tops[i] = -kInf;
  for (int64_t i = 0; i < plan.rows * 16; ++i) lane_sums[i] = 0;
  for (int64_t i = 0; i < plan.rows * plan.width; ++i) acc[i] = 0;

  const int64_t row_bytes = p.head_dim * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = row_bytes < kAheadBytes ? kAheadBytes / row_bytes : 1;
  for (int64_t at = begin; at < end; at += kDecodeTile) {
    const int64_t keys = end - at < kDecodeTile ? end - at : kDecodeTile;
    const T* const tile_key = key + at * p.key_stride.row;
    const T* const tile_value = value + at * p.value_stride.row;
    if (p.head_dim < kLanes) {
      pack(tile_key, p.key_stride.row, keys, p.head_dim, packed);
      pack(tile_value, p.value_stride.row, keys, p.head_dim, packed + kDecodeTile * kLanes);
    }
    // Query i sees slots before range.end - Q + 1 + i.
    const int64_t oldest = range.end - p.queries + 1 - at;
    const int64_t common = oldest < 0 ? 0 : oldest < keys ? oldest : keys;
    for (int64_t r = 0; r < plan.rows; r += kMaxRows) {
      const int rows = plan.rows - r < kMaxRows ? static_cast<int>(plan.rows - r) : kMaxRows;
      int32_t visible[kMaxRows];
      for (int i = 0; i < rows; ++i) {
        const int64_t last = oldest + (r + i) % p.queries;
        visible[i] = static_cast<int32_t>(last < 0 ? 0 : last < keys ? last : keys);
      }
      const Block block{queries + r * plan.width,
                        acc + r * plan.width,
                        lane_tops + r * 16,
                        lane_sums + r * 16,
                        logits,
                        visible,
                        r == 0};
      if (p.head_dim < kLanes) {
        const Tile<float> tile{packed,    packed + kDecodeTile * kLanes, kLanes, kLanes, keys, 0, 0, kLanes,
                               plan.width};
        tile_of(rows, block, tile, common);
      } else {
        const Tile<T> tile{tile_key, tile_value, p.key_stride.row, p.value_stride.row, keys,
                           end - at, ahead,      p.head_dim,       plan.width};
        tile_of(rows, block, tile, common);
      }
    }
  }

  for (int64_t r = 0; r < plan.rows; ++r) {
    const int64_t block = r / kMaxRows * kMaxRows;
    const int64_t rows = plan.rows - block < kMaxRows ? plan.rows - block : kMaxRows;
    const int64_t lanes = keys_per_vector(static_cast<int>(rows));
    const int64_t lane = block * 16 + (r - block) * lanes;
    float sum = 0;
    for (int64_t i = 0; i < lanes; ++i) sum += lane_sums[lane + i];
    sums[r] = sum;
    // A nan goes on as the maximum too, so that the merge cannot take the split for an empty one.
    tops[r] = sum == sum ? lane_tops[lane] : sum;
  }
}

// float64, one row at a time: here exactness counts, not speed.
void split_of(const DecodeParams& p, const DecodePlan& plan, int64_t task, const DecodeRange& range,
              double* partial, double* weights) {
  const int64_t head = task / plan.splits, b = head / p.num_kv_heads, h = head % p.num_kv_heads;
  const int64_t begin = range.begin + task % plan.splits * plan.split;
  const double* key = static_cast<const double*>(p.key) + b * p.key_stride.batch + h * p.key_stride.head;
  const double* value =
      static_cast<const double*>(p.value) + b * p.value_stride.batch + h * p.value_stride.head;
  for (int64_t r = 0; r < plan.rows; ++r) {
    const double* query = static_cast<const double*>(p.query) + b * p.query_stride.batch +
                          (h * (p.num_heads / p.num_kv_heads) + r / p.queries) * p.query_stride.head +
                          r % p.queries * p.query_stride.row;
    const int64_t limit = range.end - p.queries + 1 + r % p.queries;
    const int64_t end = begin + plan.split < limit ? begin + plan.split : limit;
    double top = -__builtin_inf();
    for (int64_t j = begin; j < end; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < p.head_dim; ++d) dot += query[d] * key[j * p.key_stride.row + d];
      weights[j - begin] = dot * p.scale;
      top = weights[j - begin] > top ? weights[j - begin] : top;
    }
    const double shift = top == -__builtin_inf() ? 0 : top;
    double* acc = partial + 2 * plan.rows + r * plan.width;
    for (int64_t d = 0; d < plan.width; ++d) acc[d] = 0;
    double sum = 0;
    for (int64_t j = begin; j < end; ++j) {
      const double weight = __builtin_exp(weights[j - begin] - shift);
      sum += weight;
      for (int64_t d = 0; d < p.head_dim; ++d) acc[d] += weight * value[j * p.value_stride.row + d];
    }
    partial[r] = sum == sum ? top : sum;
    partial[plan.rows + r] = sum;
  }
}

// ---- the splits of one row, in their order ----

CSP_INLINE float exp_of(float x) {
  return __builtin_expf(x);
}
CSP_INLINE double exp_of(double x) {
  return __builtin_exp(x);
}
CSP_INLINE float log_of(float x) {
  return __builtin_logf(x);
}
CSP_INLINE double log_of(double x) {
  return __builtin_log(x);
}

// out = inverse * sum of factor * acc; a factor of 0 is a split that saw nothing and wrote nothing.
template <typename T>
void sum_splits(const DecodeParams& p, const DecodePlan& plan, const float* factors, const float* acc,
                float inverse, T* out) {
  for (int64_t slot = 0; slot < p.head_dim; slot += kLanes) {
    vfloat total{};
    for (int64_t s = 0; s < plan.splits * plan.partial; s += plan.partial) {
      if (factors[s] != 0) total += load(acc + s + slot) * factors[s];
    }
    const int64_t column = p.head_dim < kLanes ? 0 : column_of(slot, p.head_dim);
    store_n(out + column, total * inverse, p.head_dim);
  }
}
void sum_splits(const DecodeParams& p, const DecodePlan& plan, const double* factors, const double* acc,
                double inverse, double* out) {
  for (int64_t d = 0; d < p.head_dim; ++d) {
    double total = 0;
    for (int64_t s = 0; s < plan.splits * plan.partial; s += plan.partial) {
      if (factors[s] != 0) total += acc[s + d] * factors[s];
    }
    out[d] = total * inverse;
  }
}

template <typename T, typename Acc>
void merge_of(const DecodeParams& p, const DecodePlan& plan, int64_t head, Acc* partials) {
  const Acc inf = static_cast<Acc>(__builtin_inf());
  // n e^-shift is computed as e^(log n - shift): of a tiny n the product would be 0 * inf.
  const double log_n = p.n > 0 ? __builtin_log(p.n) : -__builtin_inf();
  for (int64_t r = 0; r < plan.rows; ++r) {
    Acc* const tops = partials + r;
    const Acc* const sums = tops + plan.rows;
    Acc top = -inf;
    for (int64_t s = 0; s < plan.splits * plan.partial; s += plan.partial)
      top = tops[s] > top ? tops[s] : top;
    const Acc shift = top == -inf ? 0 : top;
    Acc total = 0;
    for (int64_t s = 0; s < plan.splits * plan.partial; s += plan.partial) {
      const Acc factor = tops[s] == -inf ? 0 : exp_of(tops[s] - shift);
      if (factor != 0) total += sums[s] * factor;
      tops[s] = factor;
    }
    // sigmoid(lse - log n) / total, in one division.
    const Acc inverse = total == 0 ? 0 : 1 / (total + static_cast<Acc>(__builtin_exp(log_n - shift)));
    const int64_t row = head * plan.rows + r;
    sum_splits(p, plan, tops, partials + 2 * plan.rows + r * plan.width, inverse,
               static_cast<T*>(p.out) + row * p.head_dim);
    static_cast<Acc*>(p.lse)[row] = shift + log_of(total);
  }
}

}  // namespace

void decode_split(const DecodeParams& params, const DecodePlan& plan, int64_t task, const DecodeRange& range,
                  void* partial, void* scratch) {
  auto* const to = static_cast<float*>(partial);
  auto* const worker = static_cast<float*>(scratch);
  switch (params.dtype) {
    case DType::kFloat32:
      return split_of<float>(params, plan, task, range, to, worker);
    case DType::kFloat16:
      return split_of<Float16>(params, plan, task, range, to, worker);
    case DType::kBFloat16:
      return split_of<BFloat16>(params, plan, task, range, to, worker);
    case DType::kFloat64:
      return split_of(params, plan, task, range, static_cast<double*>(partial),
                      static_cast<double*>(scratch));
  }
}

void decode_merge(const DecodeParams& params, const DecodePlan& plan, int64_t head, void* partials) {
  switch (params.dtype) {
    case DType::kFloat32:
      return merge_of<float>(params, plan, head, static_cast<float*>(partials));
    case DType::kFloat16:
      return merge_of<Float16>(params, plan, head, static_cast<float*>(partials));
    case DType::kBFloat16:
      return merge_of<BFloat16>(params, plan, head, static_cast<float*>(partials));
    case DType::kFloat64:
      return merge_of<double>(params, plan, head, static_cast<double*>(partials));
  }
}

}  // namespace csp::CSP_ISA
