#pragma once

#include "select_kernel.h"
#include "simd.h"

// What select ranks: the candidates of a batch row, where their lists are valid, and the pooled scores.

namespace csp::CSP_ISA {
namespace {

// In SelectScratch::valid and, for the lists an entry was seen in, in SelectScratch::state.
constexpr uint8_t kSelf = 1;
constexpr uint8_t kCross = 2;
constexpr uint8_t kChosen = 4;  // in state
constexpr int kModalities = 128;

// ---- the candidates of a batch row ----

// The last position at which a key of each modality still has an observer of its own and of another one.
struct Validity {
  int64_t self[kModalities];
  int64_t cross[kModalities];
};

Validity validity_of(const SelectParams& p, const int8_t* query_modality) {
  Validity until;
  for (int64_t& last : until.self) last = -1;
  for (int64_t i = 0; i < p.window; ++i) {
    if (query_modality[i] >= 0) until.self[query_modality[i]] = p.causal ? p.keys - p.window + i : p.keys;
  }
  int best = 0;
  for (int m = 1; m < kModalities; ++m) best = until.self[m] > until.self[best] ? m : best;
  int64_t second = -1;
  for (int m = 0; m < kModalities; ++m) {
    if (m != best && until.self[m] > second) second = until.self[m];
  }
  for (int m = 0; m < kModalities; ++m) until.cross[m] = m == best ? second : until.self[best];
  return until;
}

struct Candidates {
  int64_t count = 0;
  int64_t first_recent = 0;  // the real keys from here on are kept
};

Candidates candidates_of(const SelectParams& p, const int8_t* modality, const int8_t* query_modality,
                         const SelectScratch& s) {
  int64_t real = 0;
  for (int64_t j = 0; j < p.keys; ++j) real += modality[j] >= 0;
  const bool literal = p.k_self >= 0;
  Candidates candidates;
  if (real < p.budget || (real == p.budget && !literal)) return candidates;
  candidates.first_recent = p.keys;
  for (int64_t left = p.recent < real ? p.recent : real; left > 0;) {
    left -= modality[--candidates.first_recent] >= 0;
  }
  const Validity until = validity_of(p, query_modality);
  for (int64_t j = 0, count = 0; j < candidates.first_recent; ++j) {
    const int8_t m = modality[j];
    if (m < 0) continue;
    s.position[count] = static_cast<int32_t>(j);
    s.valid[count] =
        static_cast<uint8_t>((j <= until.self[m] ? kSelf : 0) | (j <= until.cross[m] ? kCross : 0));
    candidates.count = ++count;
  }
  return candidates;
}

// ---- pooling ----

// How many candidates a window takes in before and after its own.
struct PoolReach {
  int64_t before, after;
};

PoolReach pool_reach(const SelectParams& p) {
  const int64_t half = p.pool_kernel / 2;
  return {half, p.pool == Pool::kPast ? 0 : half};
}

// kMax or kAvg over one run.
template <Pool kPool, typename Real>
void pool_run(const Real* __restrict x, Real* __restrict out, int64_t size, PoolReach reach) {
  const int64_t before = reach.before < size - 1 ? reach.before : size - 1;
  const int64_t after = reach.after < size - 1 ? reach.after : size - 1;
  const Real start = kPool == Pool::kMax ? static_cast<Real>(__builtin_nan("")) : Real{0};
  for (int64_t j = 0; j < size; ++j) out[j] = start;
  // Offset by offset, so that neighbours of many elements are taken in at once, each in ascending order.
  for (int64_t offset = -before; offset <= after; ++offset) {
    const int64_t begin = offset < 0 ? -offset : 0;
    const int64_t end = offset < 0 ? size : size - offset;
    for (int64_t j = begin; j < end; ++j) {
      const Real value = x[j + offset];
      if constexpr (kPool == Pool::kMax) {
        out[j] = value > out[j] || out[j] != out[j] ? value : out[j];
      } else {
        out[j] += value;
      }
    }
  }
  if constexpr (kPool == Pool::kAvg) {
    for (int64_t j = 0; j < size; ++j) {
      const int64_t left = j < before ? j : before;
      const int64_t right = size - 1 - j < after ? size - 1 - j : after;
      out[j] /= static_cast<Real>(left + right + 1);
    }
  }
}

template <typename Real>
void pool_runs(const SelectParams& p, const int8_t* modality, const int32_t* position, int64_t count,
               const Real* x, Real* out) {
  const PoolReach reach = pool_reach(p);
  for (int64_t begin = 0, end; begin < count; begin = end) {
    end = begin + 1;
    while (end < count && modality[position[end]] == modality[position[begin]]) ++end;
    if (p.pool == Pool::kAvg) {
      pool_run<Pool::kAvg>(x + begin, out + begin, end - begin, reach);
    } else {
      pool_run<Pool::kMax>(x + begin, out + begin, end - begin, reach);
    }
  }
}

}  // namespace
}  // namespace csp::CSP_ISA
