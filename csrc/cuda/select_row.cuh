#pragma once

#include "select_candidates.cuh"
#include "select_plan.h"

// The small path of select: one block per row, everything in one launch.
namespace csp {
namespace {

using namespace simt;

constexpr int kStrips = 4;       // of 32 keys that a warp has in flight
constexpr int kNear = 4;         // steps up to which pooling takes its neighbours in whole vectors
constexpr uint32_t kCrowd = 32;  // more members of a bin than this are not compared one by one

// What spare2 says of a candidate while it is pooled.
constexpr int kModalityMask = 127, kInSelf = 128, kInCross = 256;

// ---- reading ----

template <typename T>
CSP_DEVICE void load_strips(const void* scores, int64_t offset, int begin, int end, float (&out)[kStrips]) {
  const Global<const T> from = global<T>(scores) + offset;
  CSP_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    const int j = begin + 32 * i + lane();
    if (j < end) out[i] = to_float(load_readonly<1>(from + j)[0]);
  }
}

CSP_DEVICE void load_strips(DType dtype, const void* scores, int64_t offset, int begin, int end,
                            float (&out)[kStrips]) {
  if (dtype == DType::kFloat32) {
    load_strips<float>(scores, offset, begin, end, out);
  } else if (dtype == DType::kFloat16) {
    load_strips<Half>(scores, offset, begin, end, out);
  } else {
    load_strips<BFloat16>(scores, offset, begin, end, out);
  }
}

// An element is among the best k when (key, tie, place) is not behind the cut's.
struct Cut {
  uint32_t key, tie, place;
};

// What a thread, and then the block, finds among the listed scores.
struct Totals {
  double sum_self = 0, sum_cross = 0;  // without NaNs
  uint32_t listed_self = 0, listed_cross = 0;
  uint32_t low_self = kAbsent, low_cross = kAbsent;  // the range of the keys
  uint32_t high_self = 0, high_cross = 0;
};

// The candidates of a row, in the order of their positions and padded to a multiple of four by absent ones
// that rank behind all others. A thread takes the groups of four thread(), thread() + kThreads, ...
template <int kThreads, bool kRanks>
struct Row {
  static constexpr int kWarps = kThreads / 32;
  using Four = Vec<uint32_t, 4>;

  const SelectParams& p;
  // Keys of the pooled scores, kAbsent where a candidate does not stand in the list, and of self + cross. The
  // keys of a list become its ranks; `self` becomes the final keys.
  Shared<uint32_t> self, cross, tie;
  Shared<uint32_t> spare0, spare1;
  Shared<uint16_t> spare2;
  Shared<uint32_t> bins;  // also the selector's histogram
  Selector<kThreads> selector;
  int count;

  template <typename Use>
  CSP_DEVICE void each_group(Use use) const {
    CSP_NO_UNROLL
    for (int first = 4 * thread(); first < count; first += 4 * kThreads) use(first);
  }
  template <typename Use>
  CSP_DEVICE void each_listed(Shared<uint32_t> list, Use use) const {
    each_group([&](int first) {
      const Four keys = load_vec<4>(list + first);
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (keys[e] != kAbsent) use(first + e, keys[e]);
      }
    });
  }
  // Of two equal candidates the later comes first.
  CSP_DEVICE uint32_t place(int c) const { return static_cast<uint32_t>(count - 1 - c); }

  // ---- entering: scores become keys ----

  CSP_DEVICE uint32_t enter(float score, bool listed, double& sum, uint32_t& number, uint32_t& low,
                            uint32_t& high) const {
    if (!listed) return kAbsent;
    const uint32_t key = descending(score);
    if constexpr (kRanks) {
      low = key < low ? key : low;
      high = key > high ? key : high;
    } else {
      sum += score == score ? score : 0.0f;
      ++number;
    }
    return key;
  }
  CSP_DEVICE uint32_t enter_self(float score, bool listed, Totals& t) const {
    return enter(score, listed, t.sum_self, t.listed_self, t.low_self, t.high_self);
  }
  CSP_DEVICE uint32_t enter_cross(float score, bool listed, Totals& t) const {
    return enter(score, listed, t.sum_cross, t.listed_cross, t.low_cross, t.high_cross);
  }

  CSP_DEVICE void pad() const {
    const int c = count + thread();
    if (c >= (count + 3) / 4 * 4) return;
    self[c] = kAbsent;
    cross[c] = kAbsent;
    tie[c] = kAbsent;
    if (p.pool != Pool::kNone) spare2[c] = 0;
  }

  // ---- pooling: spare0 and spare1 hold the scores, spare2 modality | kInSelf | kInCross ----

  template <Pool kPool>
  CSP_DEVICE void pool_group(int first, Totals& totals) const {
    const PoolReach reach(p);
    if (reach.before <= kNear && first >= kNear && first + 4 + kNear <= count && one_run(first)) {
      Pooled<kPool> own[4], other[4];
      const Vec<float, 4> mine = pool_near(as<float>(spare0) + first, reach, own);
      const Vec<float, 4> theirs = pool_near(as<float>(spare1) + first, reach, other);
      const Vec<uint16_t, 4> marks = load_vec<4>(spare2 + first);
      const int size = reach.before + 1 + reach.after;
      Four keys_self, keys_cross, ties;
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) {
        keys_self[e] = enter_self(own[e].over(size), (marks[e] & kInSelf) != 0, totals);
        keys_cross[e] = enter_cross(other[e].over(size), (marks[e] & kInCross) != 0, totals);
        ties[e] = descending(mine[e] + theirs[e]);
      }
      store_vec(self + first, keys_self);
      store_vec(cross + first, keys_cross);
      store_vec(tie + first, ties);
      return;
    }
    const int end = first + 4 < count ? first + 4 : count;
    CSP_NO_UNROLL
    for (int c = first; c < end; ++c) {
      const PoolWindow window =
          pool_window(c, count, reach, [&](int i) { return spare2[i] & kModalityMask; });
      const auto mine = [&](int i) { return float(as<float>(spare0)[i]); };
      const auto theirs = [&](int i) { return float(as<float>(spare1)[i]); };
      const int marks = spare2[c];
      self[c] = enter_self(pool_over<kPool>(window, mine), (marks & kInSelf) != 0, totals);
      cross[c] = enter_cross(pool_over<kPool>(window, theirs), (marks & kInCross) != 0, totals);
      tie[c] = descending(mine(c) + theirs(c));
    }
  }

  // Whether a group and its neighbours on both sides have one modality.
  CSP_DEVICE bool one_run(int first) const {
    const int own = spare2[first];
    int differs = 0;
    CSP_UNROLL
    for (int side = -4; side <= 4; side += 4) {
      const Vec<uint16_t, 4> four = load_vec<4>(spare2 + (first + side));
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) differs |= four[e] ^ own;
    }
    return (differs & kModalityMask) == 0;
  }

  // Four neighbours, all of whose windows lie inside one run; returns their own scores.
  template <Pool kPool>
  CSP_DEVICE static Vec<float, 4> pool_near(Shared<float> scores, PoolReach reach,
                                            Pooled<kPool> (&pooled)[4]) {
    const Vec<float, 4> left = load_vec<4>(scores - 4), own = load_vec<4>(scores);
    const Vec<float, 4> right = load_vec<4>(scores + 4);
    CSP_UNROLL
    for (int step = -kNear; step <= kNear; ++step) {
      if (step < 0 ? -step > reach.before : step > reach.after) continue;
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int at = e + step;
        pooled[e].add(at < 0 ? left[at + 4] : at < 4 ? own[at] : right[at - 4]);
      }
    }
    return own;
  }

  // ---- cutting ----

  // The word'th thing to compare by; `list` are the keys.
  CSP_DEVICE uint32_t word_of(int word, Shared<uint32_t> list, int c) const {
    return word == 0 ? uint32_t(list[c]) : word == 1 ? uint32_t(tie[c]) : place(c);
  }

  // Of the listed elements, whose keys lie below 2^bits, those up to the cut are the best `want`.
  CSP_DEVICE Cut best(Shared<uint32_t> list, uint32_t want, int bits) const {
    Cut cut{0, kAbsent, kAbsent};
    CSP_NO_UNROLL
    for (int word = 0; word < 3 && want > 0; ++word) {
      const int width = word == 0 ? bits : word == 1 ? 32 : 32 - leading_zeros(count);
      const uint32_t bound = selector.bound(want, width, [&](auto use) {
        each_listed(list, [&](int c, uint32_t key) {
          if (word > 0 && (key != cut.key || (word > 1 && uint32_t(tie[c]) != cut.tie))) return;
          use(word == 0 ? key : word_of(word, list, c));
        });
      });
      if (word == 0) cut.key = bound;
      if (word == 1) cut.tie = bound;
      if (word == 2) cut.place = bound;
    }
    return cut;
  }

  CSP_DEVICE bool within(Shared<uint32_t> list, int c, const Cut& cut) const {
    const uint32_t key = list[c];
    if (key != cut.key) return key < cut.key;
    if (cut.tie == kAbsent) return key != kAbsent;
    const uint32_t sum = tie[c];
    return sum < cut.tie || (sum == cut.tie && place(c) <= cut.place);
  }

  // ---- final keys ----

  // Writes key(self, cross) over the keys of self.
  template <typename Key>
  CSP_DEVICE void merge(Key key) const {
    each_group([&](int first) {
      Four own = load_vec<4>(self + first);
      const Four other = load_vec<4>(cross + first);
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) own[e] = key(own[e], other[e]);
      store_vec(self + first, own);
    });
  }

  CSP_DEVICE void calibrate(double sum_self, double sum_cross) const {
    const double factor_self = share_factor(sum_self, 1000 - p.rho_thousandths);
    const double factor_cross = share_factor(sum_cross, p.rho_thousandths);
    merge(
        [&](uint32_t own, uint32_t other) { return calibrated_key(factor_self, factor_cross, own, other); });
  }

  // By the one list, then by the other, of whose candidates only so many are wanted as the one leaves room.
  CSP_DEVICE void line_up(uint32_t listed_self, uint32_t listed_cross, uint32_t want) const {
    const bool by_cross = p.rho_thousandths == 1000;
    const bool enough = (by_cross ? listed_cross : listed_self) >= want;
    merge([&](uint32_t own, uint32_t other) {
      const uint32_t one = by_cross ? other : own, then = by_cross ? own : other;
      if (one != kAbsent) return enough ? one : uint32_t{0};
      return enough || then == kAbsent ? kUnlisted : then;
    });
  }

  // From ranks; returns how many bits the keys have.
  CSP_DEVICE int compose() const {
    const auto weight = static_cast<uint32_t>(p.rho_thousandths);
    const uint32_t last = 1000 * static_cast<uint32_t>(count);
    const bool unite = p.combine == Combine::kUnion;
    merge([&](uint32_t own, uint32_t other) {
      if (own == kAbsent && other == kAbsent) return last;
      const uint32_t none = unite ? last : 0;
      const uint32_t a = own == kAbsent ? none : weight * own;
      const uint32_t b = other == kAbsent ? none : (1000 - weight) * other;
      return (a < b) == unite ? a : b;
    });
    return 32 - leading_zeros(last);
  }

  // ---- ranking: keys are spread over as many bins as there are candidates, then compared inside a bin ----

  CSP_DEVICE int bin_count() const { return (count + kScanStep) / kScanStep * kScanStep; }

  CSP_DEVICE void clear(int size) const {
    CSP_NO_UNROLL
    for (int i = 4 * thread(); i < size; i += 4 * kThreads) store_vec(bins + i, Four{});
    sync_block();
  }

  // The counts of the bins become their beginnings; says whether one is a crowd.
  CSP_DEVICE bool scan_bins() const {
    bool crowd = false;
    scan_counts<kWarps>(bins, bin_count(), selector.scratch, [&](const Four& four) {
      CSP_UNROLL
      for (int e = 0; e < 4; ++e) crowd |= four[e] > kCrowd;
    });
    return sync_block_any(crowd);
  }

  // One of `parts` parts of a range, in order: the last of a range of more than one key never falls in the
  // first part when parts > 1. `lead` is the number of leading zeros of the range's length.
  CSP_DEVICE static uint32_t part_of(uint32_t distance, int lead, uint32_t parts) {
    return static_cast<uint32_t>((uint64_t{distance << (lead & 31)} * parts) >> 32);
  }

  CSP_DEVICE bool crowded(int bin) const { return bins[bin + 1] - bins[bin] > kCrowd; }

  // Divides every crowd by its range of keys, then of ties, then of places, until none is left: a division
  // leaves at most a sixteenth of the range.
  CSP_DEVICE void disperse(Shared<uint32_t> list) const {
    const Shared<uint32_t> low = spare0, high = spare1;
    for (int word = 0;;) {
      CSP_NO_UNROLL
      for (int b = thread(); b < count; b += kThreads) {
        if (!crowded(b)) continue;
        low[b] = ~uint32_t{0};
        high[b] = 0;
      }
      sync_block();
      each_listed(list, [&](int c, uint32_t) {
        const int b = uint16_t(spare2[c]);
        if (!crowded(b)) return;
        const uint32_t value = word_of(word, list, c);
        atomic_min(low + b, value);
        atomic_max(high + b, value);
      });
      sync_block();
      bool divides = false;
      CSP_NO_UNROLL
      for (int b = thread(); b < count; b += kThreads) {
        if (crowded(b)) divides |= uint32_t(low[b]) < uint32_t(high[b]);
      }
      if (!sync_block_any(divides)) {
        ++word;
        continue;
      }
      each_listed(list, [&](int c, uint32_t) {
        const int b = uint16_t(spare2[c]);
        uint32_t next = bins[b];
        if (crowded(b)) {
          const uint32_t from = low[b], range = high[b] - from;
          const uint32_t distance = word_of(word, list, c) - from;
          next += range > 0 ? part_of(distance, leading_zeros(range), bins[b + 1] - next) : 0;
        }
        spare2[c] = static_cast<uint16_t>(next);
      });
      sync_block();
      clear(bin_count());
      each_listed(list, [&](int c, uint32_t) { atomic_add(bins + uint16_t(spare2[c]), 1u); });
      sync_block();
      if (!scan_bins()) return;
    }
  }

  // The keys of a list, all in [low, high], become its ranks from 1 on.
  CSP_DEVICE void rank(Shared<uint32_t> list, uint32_t low, uint32_t high) const {
    clear(bin_count());
    const int lead = leading_zeros(high - low);
    each_listed(list, [&](int c, uint32_t key) {
      const uint32_t b = part_of(key - low, lead, static_cast<uint32_t>(count));
      spare2[c] = static_cast<uint16_t>(b);
      atomic_add(bins + b, 1u);
    });
    sync_block();
    if (scan_bins()) disperse(list);

    // The members of a bin side by side; its beginning moves to its end, which is where the next one begins.
    each_listed(list, [&](int c, uint32_t key) {
      const uint32_t at = atomic_add(bins + uint16_t(spare2[c]), 1u);
      spare0[at] = key;
      spare1[at] = static_cast<uint32_t>(c);
    });
    sync_block();
    const uint32_t listed = bins[count];
    CSP_NO_UNROLL
    for (uint32_t i = static_cast<uint32_t>(thread()); i < listed; i += kThreads) {
      const uint32_t key = spare0[i], c = spare1[i];
      const int b = uint16_t(spare2[c]);
      const uint32_t begin = b > 0 ? uint32_t(bins[b - 1]) : 0, end = bins[b];
      uint32_t rank = begin + 1;
      CSP_NO_UNROLL
      for (uint32_t m = begin; m < end; ++m) {
        const uint32_t key_of_m = spare0[m];
        if (key_of_m < key) ++rank;
        if (key_of_m != key || m == i) continue;
        const uint32_t other = spare1[m];
        const uint32_t mine = tie[c], theirs = tie[other];
        rank += theirs < mine || (theirs == mine && other > c);
      }
      list[c] = rank;
    }
    sync_block();
  }
};

// Where the arrays of a row lie.
template <bool kShared>
class Pieces {
 public:
  CSP_DEVICE Pieces(SharedArena& arena, void* workspace, int64_t row_bytes)
      : arena_(arena), next_(static_cast<char*>(workspace) + (kShared ? 0 : block_x() * row_bytes)) {}

  template <typename T>
  CSP_DEVICE Shared<T> take(int64_t count) {
    if constexpr (kShared) {
      return arena_.template take<T>(count);
    } else {
      const Global<T> piece = global<T>(next_);
      next_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
      return piece;
    }
  }

 private:
  SharedArena& arena_;
  char* next_;
};

template <int kThreads, bool kShared, bool kRanks>
CSP_KERNEL(kThreads, kShared&& kThreads == 512 ? 2 : 1)
void select_row_kernel(SelectParams p, SelectPlan plan, void* workspace) {
  constexpr int kWarps = kThreads / 32;
  CSP_SHARED(int32_t, observer_words, kObserverWords);
  CSP_SHARED(uint32_t, scratch, Selector<kThreads>::kScratch);
  CSP_SHARED(uint32_t, range, 4);
  CSP_SHARED(double, sums, 2 * kWarps);
  const int keys = static_cast<int>(p.keys);

  SharedArena arena;
  const Shared<uint32_t> bins = arena.take<uint32_t>(plan.bins);
  const Shared<uint32_t> masks = arena.take<uint32_t>((keys + 31) / 32);  // real keys, then kept ones
  Pieces<kShared> pieces(arena, workspace, plan.row_bytes);
  const int padded = (keys + 3) / 4 * 4;
  const Shared<uint32_t> self = pieces.template take<uint32_t>(padded);
  const Shared<uint32_t> cross = pieces.template take<uint32_t>(padded);
  const Shared<uint32_t> tie = pieces.template take<uint32_t>(padded);
  Shared<uint32_t> spare0 = tie, spare1 = tie;
  Shared<uint16_t> spare2 = as<uint16_t>(tie);
  if (plan.spare) {
    spare0 = pieces.template take<uint32_t>(padded);
    spare1 = pieces.template take<uint32_t>(padded);
    spare2 = pieces.template take<uint16_t>(padded);
  }
  Row<kThreads, kRanks> row{p, self, cross, tie, spare0, spare1, spare2, bins, {bins, scratch}, 0};
  const Observers observers{observer_words};
  const bool literal = plan.rule == SelectRule::kLiteral;

  row.clear(kDigits);
  // A warp reads the keys [begin, end).
  const int span = (keys + kThreads - 1) / kThreads * 32;
  const int begin = warp() * span, end = begin + span < keys ? begin + span : keys;

  for (int64_t r = block_x(); r < p.batch * p.score_heads;
       r += kShared ? p.batch * p.score_heads : grid_x()) {
    const int64_t batch = r / p.score_heads;
    const Global<const int8_t> modality = global<int8_t>(p.modality) + batch * p.keys;
    float own[kStrips] = {}, other[kStrips] = {};
    const auto load = [&](int first) {
      load_strips(p.dtype, p.self, r * p.keys, first, end, own);
      load_strips(p.dtype, p.cross, r * p.keys, first, end, other);
    };
    // The first scores are on their way while the keys are counted, where there are registers for them.
    constexpr bool kAhead = kShared && !kRanks;
    if constexpr (kAhead) load(begin);
    sync_block();  // the last row's shared memory is free

    // Real keys: how many, and how many before this warp's.
    if (thread() < 4) range[thread()] = thread() < 2 ? kAbsent : 0;
    find_observers(p, batch, observer_words);
    uint32_t real_here = 0;
    CSP_NO_UNROLL
    for (int first = begin; first < end; first += 32 * kStrips) {
      CSP_UNROLL
      for (int i = 0; i < kStrips; ++i) {
        const int strip = first + 32 * i, j = strip + lane();
        const uint32_t mask = ballot(j < end && load_readonly<1>(modality + (j < end ? j : 0))[0] >= 0);
        real_here += popcount(mask);
        if (lane() == 0 && strip < end) masks[strip / 32] = mask;
      }
    }
    uint32_t real_keys = 0;
    const uint32_t real_before = scan_warps<kWarps>(real_here, scratch, real_keys);
    const RowSize size = size_of_row(p, real_keys);
    const auto slots = static_cast<uint32_t>(size.slots);
    row.count = static_cast<int>(size.candidates);

    Cut cut{0, kAbsent, kAbsent}, cut_cross{0, kAbsent, kAbsent};
    if (slots > 0) {
      // The candidates, closed up.
      Totals totals;
      uint32_t base = real_before;
      CSP_NO_UNROLL
      for (int first = begin; first < end; first += 32 * kStrips) {
        if (!kAhead || first > begin) load(first);
        CSP_UNROLL
        for (int i = 0; i < kStrips; ++i) {
          const int strip = first + 32 * i, j = strip + lane();
          if (strip >= end) continue;
          const uint32_t mask = masks[strip / 32];
          const int c = static_cast<int>(base + popcount(mask & lanes_below()));
          base += popcount(mask);
          if ((mask >> lane() & 1) == 0 || c >= row.count) continue;
          const int m = load_readonly<1>(modality + j)[0];
          const bool in_self = observers.of_own(m, j), in_cross = observers.of_others(m, j);
          if (p.pool == Pool::kNone) {
            self[c] = row.enter_self(own[i], in_self, totals);
            cross[c] = row.enter_cross(other[i], in_cross, totals);
            tie[c] = descending(own[i] + other[i]);
          } else {
            spare0[c] = float_bits(own[i]);
            spare1[c] = float_bits(other[i]);
            spare2[c] = static_cast<uint16_t>(m | (in_self ? kInSelf : 0) | (in_cross ? kInCross : 0));
          }
        }
      }
      row.pad();
      sync_block();
      if (p.pool == Pool::kAvg) {
        row.each_group([&](int first) { row.template pool_group<Pool::kAvg>(first, totals); });
      } else if (p.pool != Pool::kNone) {
        row.each_group([&](int first) { row.template pool_group<Pool::kMax>(first, totals); });
      }

      // The best of them.
      int bits = 32;
      sync_block();
      if constexpr (kRanks) {
        const auto smaller = [](uint32_t a, uint32_t b) { return a < b ? a : b; };
        const auto larger = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
        totals.low_self = reduce_warp(totals.low_self, smaller);
        totals.low_cross = reduce_warp(totals.low_cross, smaller);
        totals.high_self = reduce_warp(totals.high_self, larger);
        totals.high_cross = reduce_warp(totals.high_cross, larger);
        if (lane() == 0) {
          atomic_min(range + 0, totals.low_self);
          atomic_min(range + 1, totals.low_cross);
          atomic_max(range + 2, totals.high_self);
          atomic_max(range + 3, totals.high_cross);
        }
        sync_block();
        CSP_NO_UNROLL
        for (int list = 0; list < 2; ++list) {
          row.rank(list == 0 ? self : cross, range[list], range[2 + list]);
        }
        bits = row.compose();
        row.clear(kDigits);
      } else if (plan.rule == SelectRule::kOneList) {
        uint32_t listed_self = 0, listed_cross = 0;
        scan_warps<kWarps>(reduce_warp(totals.listed_self, Add()), scratch, listed_self);
        scan_warps<kWarps>(reduce_warp(totals.listed_cross, Add()), scratch, listed_cross);
        row.line_up(listed_self, listed_cross, slots);
      } else if (plan.rule == SelectRule::kCalibrated) {
        const double warp_self = reduce_warp(totals.sum_self, Add());
        const double warp_cross = reduce_warp(totals.sum_cross, Add());
        if (lane() == 0) {
          sums[warp()] = warp_self;
          sums[kWarps + warp()] = warp_cross;
        }
        sync_block();
        const double sum_self = reduce_warp(lane() < kWarps ? double(sums[lane()]) : 0.0, Add());
        const double sum_cross = reduce_warp(lane() < kWarps ? double(sums[kWarps + lane()]) : 0.0, Add());
        row.calibrate(sum_self, sum_cross);
      }
      const auto quota = [&](int64_t k) { return static_cast<uint32_t>(k < row.count ? k : row.count); };
      CSP_NO_UNROLL
      for (int list = 0; list < (literal ? 2 : 1); ++list) {
        const uint32_t want = !literal ? slots : quota(list == 0 ? p.k_self : p.k_cross);
        const Cut found = row.best(list == 0 ? self : cross, want, bits);
        (list == 0 ? cut : cut_cross) = found;
      }
    }

    // Kept keys: the recent ones and those within the cut.
    uint32_t base = real_before, kept_here = 0;
    CSP_NO_UNROLL
    for (int strip = begin; strip < end; strip += 32) {
      const uint32_t mask = masks[strip / 32];
      const int c = static_cast<int>(base + popcount(mask & lanes_below()));
      base += popcount(mask);
      bool keep = (mask >> lane() & 1) != 0;
      if (keep && c < row.count) {
        keep = slots > 0 && row.within(self, c, cut);
        if (literal) {
          const bool also = slots > 0 && row.within(cross, c, cut_cross);
          keep = p.combine == Combine::kUnion ? keep || also : keep && also;
        }
      }
      const uint32_t kept = ballot(keep);
      kept_here += popcount(kept);
      sync_warp();  // every lane has read the mask that lane 0 replaces
      if (lane() == 0) masks[strip / 32] = kept;
    }
    uint32_t kept_keys = 0;
    const uint32_t kept_before = scan_warps<kWarps>(kept_here, scratch, kept_keys);
    const Global<int32_t> out = global<int32_t>(p.indices) + r * p.budget;
    const int64_t free = p.budget - kept_keys;  // not below 0 where the quotas fit into the budget
    CSP_NO_UNROLL
    for (int64_t i = thread(); i < free; i += kThreads) out[i] = -1;
    int64_t slot = free + kept_before;
    CSP_NO_UNROLL
    for (int strip = begin; strip < end; strip += 32) {
      const uint32_t kept = masks[strip / 32];
      const int64_t at = slot + popcount(kept & lanes_below());
      if ((kept >> lane() & 1) != 0 && at >= 0) out[at] = strip + lane();
      slot += popcount(kept);
    }
    if (thread() == 0) global<int32_t>(p.lengths)[r] = static_cast<int32_t>(kept_keys);
  }
}

}  // namespace
}  // namespace csp
