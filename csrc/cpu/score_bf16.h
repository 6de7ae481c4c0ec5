#pragma once

#include "score_tile.h"

// The dot product of bfloat16 pairs (AVX512-BF16), used where cpu_has_bf16_dot(): twice the rate of an fma
// and no conversion. The files stay compiled for plain AVX-512; only these functions carry the extension.

namespace csp::CSP_ISA {
namespace {

// Whether keys of type T have such a dot product in this instruction set.
template <typename T>
constexpr bool kHasPairs = false;

#if defined(__AVX512F__)

template <>
constexpr bool kHasPairs<BFloat16> = true;

// As `multiply`: query holds pairs [D / 2, 16, 2].
[[gnu::target("avx512bf16")]] inline void multiply_pairs(const uint32_t* query, const BFloat16* key,
                                                         int64_t stride, int64_t head_dim, float scale,
                                                         const BFloat16* next, int64_t next_stride,
                                                         float* z) {
  __m512 sums[kStep] = {};
  const BFloat16* rows[kStep];
  for (int k = 0; k < kStep; ++k) rows[k] = key + k * stride;
  for (int64_t begin = 0; begin < head_dim; begin += 32) {
    for (int k = 0; k < kStep; ++k) __builtin_prefetch(next + k * next_stride + begin);
    const int64_t end = begin + 32 < head_dim ? begin + 32 : head_dim;
    for (int64_t d = begin; d < end; d += 2) {
      const __m512i pairs = _mm512_loadu_si512(query + d / 2 * kRows);
      for (int k = 0; k < kStep; ++k) {
        int32_t pair;
        __builtin_memcpy(&pair, rows[k] + d, sizeof pair);
        sums[k] = _mm512_dpbf16_ps(sums[k], (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(pair));
      }
    }
  }
  for (int k = 0; k < kStep; ++k)
    _mm512_storeu_ps(z + k * kRows, _mm512_mul_ps(sums[k], _mm512_set1_ps(scale)));
}

// As `block_logits`, for an even head_dim.
[[gnu::noinline]] void block_logits_pairs(const uint32_t* query, const BFloat16* key, int64_t stride,
                                          int64_t head_dim, int64_t count, float scale, BFloat16* copied,
                                          float* z) {
  for (int64_t k = 0; k < count; k += kStep) {
    const BFloat16* step = key + k * stride;
    const BFloat16* next = step + kStep * stride;
    if (k + kStep <= count && stride <= 2 * kDirectStride) {
      multiply_pairs(query, step, stride, head_dim, scale, next, stride, z + k * kRows);
      continue;
    }
    for (int64_t row = 0; row < kStep; ++row) {
      BFloat16* out = copied + row * head_dim;
      if (k + row < count) {
        __builtin_memcpy(out, step + row * stride, head_dim * sizeof(BFloat16));
      } else {
        __builtin_memset(out, 0, head_dim * sizeof(BFloat16));
      }
    }
    multiply_pairs(query, copied, head_dim, head_dim, scale, next, stride, z + k * kRows);
  }
  hide_rest(count, z);
}

#endif

}  // namespace
}  // namespace csp::CSP_ISA
