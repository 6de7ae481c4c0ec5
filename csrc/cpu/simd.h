#pragma once

#include <cstddef>
#include <cstdint>

#include <immintrin.h>

// A thin SIMD layer on the compiler's vector types: `vfloat` is as wide as the instruction set this file is
// compiled for, and arithmetic on it is ordinary C++ (a * b + c contracts to an fma where there is one).
// NOTE: no std:: function may be called here or in a *_kernel.cpp: an inline one compiled for AVX-512 could
// be the copy that the linker keeps for everybody. python_tests/test_packaging.py checks the objects for
// that.

#ifndef CSP_ISA
#define CSP_ISA baseline
#endif

namespace csp::CSP_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#define CSP_INLINE [[gnu::always_inline]] inline

constexpr float kInf = __builtin_inff();

// ---- scalars ----

CSP_INLINE float to_float(float x) {
  return x;
}
CSP_INLINE double to_float(double x) {
  return x;
}
CSP_INLINE float to_float(BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t{x.bits} << 16);
}
CSP_INLINE float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shifting the half's exponent and mantissa into place and scaling by 2^112 also renormalises subnormals.
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  const float finite = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t special = 0x7f800000u | magnitude;
  const uint32_t bits = (x.bits & 0x7c00u) == 0x7c00u ? special : __builtin_bit_cast(uint32_t, finite);
  return __builtin_bit_cast(float, bits | uint32_t{x.bits & 0x8000u} << 16);
#endif
}

template <typename T>
CSP_INLINE T from_float(float x);
template <>
CSP_INLINE float from_float<float>(float x) {
  return x;
}
template <>
CSP_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
CSP_INLINE Float16 from_float<Float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Adding 0.5 lines a subnormal half up with the low mantissa bits, rounded to even by the adder.
    const float aligned = __builtin_bit_cast(float, magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

// ---- vectors ----

CSP_INLINE vfloat set1(float x) {
  return x - vfloat{};
}

CSP_INLINE vfloat load(const float* p) {
  vfloat v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
CSP_INLINE vfloat load(const BFloat16* p) {
  vshort v;
  __builtin_memcpy(&v, p, sizeof v);
  return (vfloat)(__builtin_convertvector(v, vuint) << 16);
}
CSP_INLINE vfloat load(const Float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

CSP_INLINE void store(float* p, vfloat v) {
  __builtin_memcpy(p, &v, sizeof v);
}
CSP_INLINE void store(BFloat16* p, vfloat v) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const vuint quiet = bits >> 16 | 0x40u;
  const vint nan = v != v;
  const vshort out = __builtin_convertvector(((vuint)nan & quiet) | (~(vuint)nan & rounded), vshort);
  __builtin_memcpy(p, &out, sizeof out);
}
CSP_INLINE void store(Float16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

// The first `count` lanes from memory, `fill` in the others.
template <typename T>
CSP_INLINE vfloat load_n(const T* p, int64_t count, float fill) {
  if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return (vfloat)_mm512_mask_loadu_ps((__m512)set1(fill), static_cast<__mmask16>((1u << count) - 1), p);
  }
#endif
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = from_float<T>(fill);
  __builtin_memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}
template <typename T>
CSP_INLINE void store_n(T* p, vfloat v, int64_t count) {
  if (count >= kLanes) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
  }
#endif
  T lanes[kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, count * sizeof(T));
}

// mask lanes are all ones or all zeros, as a comparison of two vectors gives them.
CSP_INLINE vfloat blend(vint mask, vfloat yes, vfloat no) {
  return mask ? yes : no;
}
CSP_INLINE vfloat vmax(vfloat a, vfloat b) {
  return a > b ? a : b;
}
CSP_INLINE vfloat vmin(vfloat a, vfloat b) {
  return a < b ? a : b;
}

// All lanes folded into one, halves first: log2(kLanes) steps.
template <typename Op>
CSP_INLINE float fold_lanes(vfloat v, Op op) {
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2) {
    vint other;
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ width;
    v = op(v, __builtin_shuffle(v, other));
  }
  return v[0];
}
CSP_INLINE float hsum(vfloat v) {
  return fold_lanes(v, [](vfloat a, vfloat b) { return a + b; });
}
CSP_INLINE float hmax(vfloat v) {
  return fold_lanes(v, [](vfloat a, vfloat b) { return vmax(a, b); });
}

// e^x for x <= 88: relative error below 2e-7; anything under -87 (and -inf) gives 0, a NaN stays one.
CSP_INLINE vfloat vexp(vfloat x) {
  const vfloat clamped = vmax(set1(-87.0f), x);   // in this order a NaN stays one
  const vfloat magic = set1(0x1.8p23f + 127.0f);  // leaves the biased exponent in the low bits
  const vfloat shifted = clamped * 1.44269504f + magic;
  const vfloat k = shifted - magic;
  const vfloat r = clamped - k * 0.693145752f - k * 1.42860677e-6f;  // |r| <= ln(2) / 2
  vfloat p = set1(1.3981999e-3f);
  p = p * r + 8.3748158e-3f;
  p = p * r + 4.1665841e-2f;
  p = p * r + 1.6666543e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // Multiplied: added to the bits, the power would turn a NaN with a payload into a number.
  const vfloat power = (vfloat)((vint)shifted << 23);
  return blend(x < set1(-87.0f), vfloat{}, p * power);
}

}  // namespace csp::CSP_ISA
