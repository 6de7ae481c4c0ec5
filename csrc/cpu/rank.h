#pragma once

#include "simd.h"

// Scores in order, best first, with one rule for ties: what select and dual_top_k rank by.

namespace csp::CSP_ISA {
namespace {

// A number whose ascending order is: the larger score first, -0.0 like 0.0, NaN last.
CSP_INLINE uint32_t descending(float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x + 0.0f);
  const uint32_t key = bits >> 31 ? bits : bits ^ 0x7fffffffu;
  return x != x ? ~uint32_t{0} : key;
}
CSP_INLINE uint64_t descending(double x) {
  const auto bits = __builtin_bit_cast(uint64_t, x + 0.0);
  const uint64_t key = bits >> 63 ? bits : bits ^ 0x7fffffffffffffffu;
  return x != x ? ~uint64_t{0} : key;
}

template <typename Real>
struct Entry {
  using Key = decltype(descending(Real{}));
  Key key;
  uint32_t index;
};

constexpr int kDigitBits = 11;
constexpr int kBuckets = 1 << kDigitBits;
// Up to this many entries an insertion sort beats clearing the histograms of a radix sort.
constexpr int64_t kInsertion = 48;

// Stable, ascending by key; the result stands in `entries` or in `other`, whichever is returned.
template <typename Real>
Entry<Real>* radix_sort(Entry<Real>* entries, Entry<Real>* other, int64_t count) {
  constexpr int kBits = 8 * sizeof(typename Entry<Real>::Key);
  constexpr int kPasses = (kBits + kDigitBits - 1) / kDigitBits;
  uint32_t starts[kPasses][kBuckets] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int pass = 0; pass < kPasses; ++pass) {
      ++starts[pass][entries[i].key >> pass * kDigitBits & (kBuckets - 1)];
    }
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = pass * kDigitBits;
    uint32_t* start = starts[pass];
    if (start[entries[0].key >> shift & (kBuckets - 1)] == count) continue;  // one digit for all
    uint32_t sum = 0;
    for (int bucket = 0; bucket < kBuckets; ++bucket) {
      const uint32_t size = start[bucket];
      start[bucket] = sum;
      sum += size;
    }
    for (int64_t i = 0; i < count; ++i) {
      other[start[entries[i].key >> shift & (kBuckets - 1)]++] = entries[i];
    }
    Entry<Real>* const sorted = other;
    other = entries;
    entries = sorted;
  }
  return entries;
}

// Stable, ascending by key, in place.
template <typename Real>
void insertion_sort(Entry<Real>* entries, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const Entry<Real> entry = entries[i];
    int64_t j = i;
    for (; j > 0 && entries[j - 1].key > entry.key; --j) entries[j] = entries[j - 1];
    entries[j] = entry;
  }
}

// Puts every run of equal keys that begins among the first `want` in the order of `tie`; their keys are lost.
template <typename Real>
void break_ties(Entry<Real>* entries, Entry<Real>* other, int64_t count, int64_t want, const Real* tie) {
  for (int64_t begin = 0, end; begin < count && begin < want; begin = end) {
    const auto key = entries[begin].key;
    end = begin + 1;
    while (end < count && entries[end].key == key) ++end;
    const int64_t size = end - begin;
    if (size == 1) continue;
    for (int64_t i = begin; i < end; ++i) entries[i].key = descending(tie[entries[i].index]);
    if (size <= kInsertion) {
      insertion_sort(entries + begin, size);
      continue;
    }
    const Entry<Real>* sorted = radix_sort(entries + begin, other, size);
    if (sorted != entries + begin) __builtin_memcpy(entries + begin, sorted, size * sizeof(Entry<Real>));
  }
}

// Drops what the leading digit already puts behind the best `want`; returns how many are left.
template <typename Real>
int64_t keep_best(Entry<Real>* entries, int64_t count, int64_t want, const uint32_t* leading) {
  constexpr int kShift = 8 * sizeof(typename Entry<Real>::Key) - kDigitBits;
  uint32_t last = 0;
  for (int64_t sum = leading[0]; sum < want;) sum += leading[++last];
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    entries[kept] = entries[i];
    kept += entries[i].key >> kShift <= last;
  }
  return kept;
}

// Writes the indices of the best `want` of the n values that `valid` accepts to order, best first. Equal
// values: the higher tie (where given), then the later index. Returns how many were written.
template <typename T, typename Real, typename Valid>
int64_t rank_best(const T* values, const Real* tie, int64_t n, int64_t want, Entry<Real>* entries,
                  Entry<Real>* other, int32_t* order, Valid&& valid) {
  constexpr int kShift = 8 * sizeof(typename Entry<Real>::Key) - kDigitBits;
  if (want <= 0) return 0;
  uint32_t leading[kBuckets] = {};
  int64_t count = 0;
  // The later index goes in first, and all that follows is stable.
  for (int64_t i = n - 1; i >= 0; --i) {
    const auto key = descending(to_float(values[i]));
    const bool take = valid(i);
    entries[count] = {key, static_cast<uint32_t>(i)};
    leading[key >> kShift] += take;
    count += take;
  }
  if (want < count) count = keep_best(entries, count, want, leading);
  Entry<Real>* sorted = entries;
  if (count <= kInsertion) {
    insertion_sort(entries, count);
  } else {
    sorted = radix_sort(entries, other, count);
  }
  if (tie) break_ties(sorted, sorted == entries ? other : entries, count, want, tie);
  const int64_t best = count < want ? count : want;
  for (int64_t i = 0; i < best; ++i) order[i] = static_cast<int32_t>(sorted[i].index);
  return best;
}

}  // namespace
}  // namespace csp::CSP_ISA
