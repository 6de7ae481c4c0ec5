#pragma once

#include "score.cuh"

// score in float32 arithmetic, in two passes. Both multiply a tile of 32 rows with one of 128 keys; a thread
// holds 4 x 8 of the logits. Whatever the layout: where rows are no whole 16-byte vectors, they are read
// element by element.
namespace csp::score_kernels {

constexpr int kFmaDims = 32;    // dims that lie in shared memory at once
constexpr int kFmaStride = 36;  // floats of a row there: the rows of eight threads lie in different banks
constexpr int kKeyThreads = 16, kRowThreads = kFmaThreads / kKeyThreads;
constexpr int kMyRows = kFmaRows / kRowThreads, kMyKeys = kFmaKeys / kKeyThreads;

// Rows of kFmaDims floats, from dim `dim` on; row r begins at element row_at(r), negative: zeros.
template <int kRows, typename T, typename RowAt>
CSP_DEVICE void stage(const ScoreArgs& a, Shared<float> to, Global<const T> from, int dim, RowAt row_at) {
  constexpr int kVec = 16 / sizeof(T);
  if (a.vectors) {
    constexpr int kChunks = kFmaDims / kVec;
    CSP_UNROLL
    for (int base = 0; base < kRows * kChunks; base += kFmaThreads) {
      const int row = (base + thread()) / kChunks, column = (base + thread()) % kChunks * kVec;
      const int64_t at = row_at(row);
      Vec<T, kVec> x{};
      if (at >= 0 && dim + column < a.head_dim) x = load_readonly<kVec>(from + (at + dim + column));
      CSP_UNROLL
      for (int i = 0; i < kVec; i += 4) {
        store_vec(
            to + (row * kFmaStride + column + i),
            Vec<float, 4>{{to_float(x[i]), to_float(x[i + 1]), to_float(x[i + 2]), to_float(x[i + 3])}});
      }
    }
    return;
  }
  const int column = thread() % kFmaDims;
  CSP_UNROLL
  for (int row = thread() / kFmaDims; row < kRows; row += kFmaThreads / kFmaDims) {
    const int64_t at = row_at(row);
    float x = 0;
    if (at >= 0 && dim + column < a.head_dim) x = to_float(T(from[at + dim + column]));
    to[row * kFmaStride + column] = x;
  }
}

struct FmaTiles {
  Shared<float> queries;  // [kFmaRows, kFmaStride]
  Shared<float> keys;     // [kFmaKeys, kFmaStride]
};

// Logits of rows first_row.. and keys first_key..: this thread's are rows row_thread + 8 i and keys
// key_thread + 16 j of the tile. Begins with a barrier.
template <typename T>
CSP_DEVICE void tile_logits(const ScoreArgs& a, const FmaTiles& tiles, Global<const T> queries,
                            Global<const T> keys, int first_row, int first_key,
                            float (&t)[kMyRows][kMyKeys]) {
  const int key_thread = thread() % kKeyThreads, row_thread = thread() / kKeyThreads;
  CSP_UNROLL
  for (int i = 0; i < kMyRows; ++i) {
    CSP_UNROLL
    for (int j = 0; j < kMyKeys; ++j) t[i][j] = 0;
  }
  for (int dim = 0; dim < a.head_dim; dim += kFmaDims) {
    sync_block();
    stage<kFmaRows>(a, tiles.queries, queries, dim, [&](int r) -> int64_t {
      const int row = first_row + r, query = row / a.group;
      if (row >= a.rows) return -1;
      return query * a.query_stride.row + (row - query * a.group) * a.query_stride.head;
    });
    stage<kFmaKeys>(a, tiles.keys, keys, dim, [&](int k) -> int64_t {
      return first_key + k < a.keys ? (first_key + k) * a.key_stride.row : -1;
    });
    sync_block();
    CSP_UNROLL
    for (int d = 0; d < kFmaDims; d += 4) {
      Vec<float, 4> q[kMyRows];
      CSP_UNROLL
      for (int i = 0; i < kMyRows; ++i) {
        q[i] = load_vec<4>(tiles.queries + ((row_thread + i * kRowThreads) * kFmaStride + d));
      }
      CSP_UNROLL
      for (int j = 0; j < kMyKeys; ++j) {
        const Vec<float, 4> k = load_vec<4>(tiles.keys + ((key_thread + j * kKeyThreads) * kFmaStride + d));
        CSP_UNROLL
        for (int i = 0; i < kMyRows; ++i) {
          CSP_UNROLL
          for (int c = 0; c < 4; ++c) t[i][j] = fmaf(q[i][c], k[c], t[i][j]);
        }
      }
    }
  }
  CSP_UNROLL
  for (int i = 0; i < kMyRows; ++i) {
    CSP_UNROLL
    for (int j = 0; j < kMyKeys; ++j) t[i][j] *= a.scale;
  }
}

// First pass. A block: 32 rows of a head and one split of its keys.
template <typename T>
CSP_KERNEL(kFmaThreads, 3)
void score_rows_fma(const ScoreArgs a) {
  CSP_SHARED(float, query_tile, kFmaRows* kFmaStride);
  CSP_SHARED(float, key_tile, kFmaKeys* kFmaStride);
  const int split = block_in_head() % a.splits, row_tile = block_in_head() / a.splits;
  const Head head = head_of_rows(a);
  const int first = row_tile * kFmaRows;
  const int key_thread = thread() % kKeyThreads, row_thread = thread() / kKeyThreads;

  int last[kMyRows];
  CSP_UNROLL
  for (int i = 0; i < kMyRows; ++i) last[i] = last_key(a, first + row_thread + i * kRowThreads);
  const int begin = split * a.split_keys;
  const int final_row = first + kFmaRows < a.rows ? first + kFmaRows - 1 : a.rows - 1;
  const int seen = last_key(a, final_row) + 1;
  const int end = seen - begin < a.split_keys ? seen : begin + a.split_keys;

  RowSum rows[kMyRows];
  for (int key = begin; key < end; key += kFmaKeys) {
    float t[kMyRows][kMyKeys];
    tile_logits(a, {Shared<float>(query_tile), Shared<float>(key_tile)}, queries_of<T>(a, head),
                keys_of<T>(a, head), first, key, t);
    float top[kMyRows];
    CSP_UNROLL
    for (int i = 0; i < kMyRows; ++i) top[i] = -kInfinity;
    CSP_UNROLL
    for (int j = 0; j < kMyKeys; ++j) {
      const int k = key + key_thread + j * kKeyThreads;
      const bool real = key_modality(a, head, k, end) >= 0;
      CSP_UNROLL
      for (int i = 0; i < kMyRows; ++i) {
        if (!real || k > last[i]) t[i][j] = -kInfinity;
        top[i] = fmaxf(top[i], t[i][j]);
      }
    }
    CSP_UNROLL
    for (int i = 0; i < kMyRows; ++i) {
      if (top[i] > rows[i].top + kSlack) rows[i] = add(rows[i], {top[i], 0});
      CSP_UNROLL
      for (int j = 0; j < kMyKeys; ++j) rows[i].sum += exp2_approx(t[i][j] - rows[i].top);
    }
  }
  CSP_UNROLL
  for (int i = 0; i < kMyRows; ++i) {
    const RowSum sum = reduce_lanes<1, kKeyThreads / 2>(rows[i]);
    const int row = first + row_thread + i * kRowThreads;
    if (key_thread == 0 && row < a.rows) {
      store_row_sum(global<float>(a.partials) + partial_at(a, head, row, split), sum);
    }
  }
}

// Second pass. A block: 128 keys of a head against all rows that see one of them.
template <typename T>
CSP_KERNEL(kFmaThreads, 3)
void score_columns_fma(const ScoreArgs a) {
  CSP_SHARED(float, query_tile, kFmaRows* kFmaStride);
  CSP_SHARED(float, key_tile, kFmaKeys* kFmaStride);
  CSP_SHARED(float, constants, kFmaRows);
  CSP_SHARED(int, modalities, kFmaRows);
  const Head head = head_of_columns(a);
  const int first_key = block_in_head() * kFmaKeys;
  const int key_thread = thread() % kKeyThreads, row_thread = thread() / kKeyThreads;

  int modality[kMyKeys];
  float self[kMyKeys], cross[kMyKeys];
  CSP_UNROLL
  for (int j = 0; j < kMyKeys; ++j) {
    modality[j] = key_modality(a, head, first_key + key_thread + j * kKeyThreads, a.keys);
    self[j] = cross[j] = 0;
  }
  for (int row = first_row(a, first_key) / kFmaRows * kFmaRows; row < a.rows; row += kFmaRows) {
    sync_block();
    if (thread() < kFmaRows) {
      float constant;
      modalities[thread()] = row_constant(a, head, row + thread(), &constant);
      constants[thread()] = constant;
    }
    sync_block();
    float t[kMyRows][kMyKeys];
    tile_logits(a, {Shared<float>(query_tile), Shared<float>(key_tile)}, queries_of<T>(a, head),
                keys_of<T>(a, head), row, first_key, t);
    CSP_UNROLL
    for (int i = 0; i < kMyRows; ++i) {
      const int r = row_thread + i * kRowThreads;
      const int row_modality = modalities[r];
      const float constant = constants[r];
      if (row_modality < 0) continue;
      CSP_UNROLL
      for (int j = 0; j < kMyKeys; ++j) {
        if (row + r < first_row(a, first_key + key_thread + j * kKeyThreads)) continue;
        const float p = exp2_approx(t[i][j] - constant);
        self[j] += row_modality == modality[j] ? p : 0.0f;
        cross[j] += row_modality == modality[j] ? 0.0f : p;
      }
    }
  }

  // The sums of the row threads, [row thread, self and cross, key], in the place of the keys.
  sync_block();
  const Shared<float> sums(key_tile);
  CSP_UNROLL
  for (int j = 0; j < kMyKeys; ++j) {
    const int at = 2 * row_thread * kFmaKeys + key_thread + j * kKeyThreads;
    sums[at] = self[j];
    sums[at + kFmaKeys] = cross[j];
  }
  sync_block();
  const int key = first_key + thread();
  if (key < a.keys) {
    float total_self = 0, total_cross = 0;
    CSP_UNROLL
    for (int w = 0; w < kRowThreads; ++w) {
      total_self += sums[2 * w * kFmaKeys + thread()];
      total_cross += sums[(2 * w + 1) * kFmaKeys + thread()];
    }
    store_columns(a, head, key, key_modality(a, head, key, a.keys), total_self, total_cross);
  }
}

}  // namespace csp::score_kernels
