#pragma once

#include <cmath>

#include "csp/select.h"
#include "rank.cuh"

// What select ranks: how many candidates a row has, in which lists a candidate stands, and its pooled scores.
namespace csp::simt {

// ---- how many ----

struct RowSize {
  int64_t candidates;  // the real keys before the recent ones; 0 where the row is kept whole
  int64_t slots;       // for candidates
};

CSP_DEVICE RowSize size_of_row(const SelectParams& p, int64_t real) {
  if (real < p.budget || (real == p.budget && p.k_self < 0)) return {0, 0};
  const int64_t candidates = real - (real < p.recent ? real : p.recent);
  const int64_t room = p.budget - p.recent;
  return {candidates, room < candidates ? room : candidates};
}

// ---- validity ----

constexpr int kModalities = 128;
constexpr int kObserverWords = kModalities + 3;

// Per modality the last position at which a key still has an observer of its own; then the modality that
// reaches furthest, how far it does, and how far the others do.
struct Observers {
  Global<const int32_t> words;

  CSP_DEVICE bool of_own(int modality, int64_t position) const {
    return position <= int32_t(words[modality]);
  }
  CSP_DEVICE bool of_others(int modality, int64_t position) const {
    const bool furthest = modality == int32_t(words[kModalities]);
    return position <= int32_t(words[kModalities + (furthest ? 2 : 1)]);
  }
};

// Fills kObserverWords words; what is written is there for all after the caller's next barrier.
CSP_DEVICE void find_observers(const SelectParams& p, int64_t batch, Shared<int32_t> words) {
  const Global<const int8_t> queries = global<int8_t>(p.query_modality) + batch * p.window;
  for (int m = thread(); m < kModalities; m += block_threads()) words[m] = -1;
  sync_block();
  CSP_NO_UNROLL
  for (int64_t i = thread(); i < p.window; i += block_threads()) {
    const int m = int8_t(queries[i]);
    if (m >= 0) atomic_max(words + m, static_cast<int32_t>(p.causal ? p.keys - p.window + i : p.keys));
  }
  sync_block();
  if (warp() != 0) return;
  const auto larger = [](int32_t a, int32_t b) { return a > b ? a : b; };
  int32_t first = -1;
  for (int m = lane(); m < kModalities; m += 32) first = larger(first, words[m]);
  first = reduce_warp(first, larger);
  int32_t furthest = -1, second = -1;
  for (int m = lane(); m < kModalities; m += 32) {
    if (int32_t(words[m]) == first) furthest = m;
  }
  furthest = reduce_warp(furthest, larger);
  for (int m = lane(); m < kModalities; m += 32) {
    if (m != furthest) second = larger(second, words[m]);
  }
  second = reduce_warp(second, larger);
  if (lane() == 0) {
    words[kModalities] = furthest;
    words[kModalities + 1] = first;
    words[kModalities + 2] = second;
  }
}

// ---- pooling ----

// How many candidates a window takes in before and after its own.
struct PoolReach {
  int before, after;

  CSP_DEVICE explicit PoolReach(const SelectParams& p)
      : before(static_cast<int>(p.pool_kernel < p.keys ? p.pool_kernel / 2 : p.keys)),
        after(p.pool == Pool::kPast ? 0 : before) {}
};

// kMax or kAvg: the maximum passes over a NaN where it can; the mean adds up from the left.
template <Pool kPool>
struct Pooled {
  float value = kPool == Pool::kMax ? NAN : 0.0f;

  CSP_DEVICE void add(float score) {
    if constexpr (kPool == Pool::kMax) {
      value = fmaxf(value, score);
    } else {
      value += score;
    }
  }
  CSP_DEVICE float over(int size) const {
    return kPool == Pool::kMax ? value : value / static_cast<float>(size);
  }
};

// The candidates within reach of c that stand in c's run of one modality.
struct PoolWindow {
  int begin, end;
};

template <typename Modality>
CSP_DEVICE PoolWindow pool_window(int c, int count, PoolReach reach, Modality modality) {
  const int own = modality(c);
  PoolWindow window{c, c + 1};
  CSP_NO_UNROLL
  while (window.begin > 0 && c - window.begin < reach.before && modality(window.begin - 1) == own)
    --window.begin;
  CSP_NO_UNROLL
  while (window.end < count && window.end - c <= reach.after && modality(window.end) == own) ++window.end;
  return window;
}

template <Pool kPool, typename Score>
CSP_DEVICE float pool_over(const PoolWindow& window, Score score) {
  Pooled<kPool> pooled;
  CSP_NO_UNROLL
  for (int i = window.begin; i < window.end; ++i) pooled.add(score(i));
  return pooled.over(window.end - window.begin);
}

// ---- the calibrated key ----

// weight / sum; 0 drops a list whose sum is 0.
CSP_DEVICE double share_factor(double sum, int weight) {
  return sum > 0 ? weight / sum : 0;
}

// What a listed score adds to the key. An infinite one stays so, though its share of an infinite sum is not a
// number.
CSP_DEVICE float share_of(double factor, float score) {
  return score - score == 0 ? static_cast<float>(factor * score) : score;
}

CSP_DEVICE uint32_t calibrated_key(double factor_self, double factor_cross, uint32_t self, uint32_t cross) {
  if (self == kAbsent && cross == kAbsent) return kUnlisted;
  const float own = self == kAbsent ? 0.0f : share_of(factor_self, score_of(self));
  const float other = cross == kAbsent ? 0.0f : share_of(factor_cross, score_of(cross));
  return descending(own + other);
}

}  // namespace csp::simt
