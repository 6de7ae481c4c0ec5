#pragma once

#include "reduce.cuh"

// Scores in order, best first: keys that sort like the scores, and the cut behind the best k of a block's
// elements.
namespace csp::simt {

// ---- keys ----

// Behind the key of every number: a NaN, a candidate that stands in no list, an element that does not count.
constexpr uint32_t kNaNKey = 0xfffffffdu;
constexpr uint32_t kUnlisted = 0xfffffffeu;
constexpr uint32_t kAbsent = 0xffffffffu;

// A number whose ascending order is: the larger score first, -0.0 like 0.0, NaN last. Never 0.
CSP_DEVICE uint32_t descending(float x) {
  const uint32_t bits = float_bits(x + 0.0f);
  const uint32_t key = bits >> 31 ? bits : bits ^ 0x7fffffffu;
  return x != x ? kNaNKey : key;
}

// The score of a key, a NaN for those behind the numbers.
CSP_DEVICE float score_of(uint32_t key) {
  return bits_float(key >> 31 ? key : key ^ 0x7fffffffu);
}

// ---- sums over the lanes and warps below ----

CSP_DEVICE uint32_t lanes_below() {
  return (1u << lane()) - 1;
}

// The sum over this lane and those below.
CSP_DEVICE uint32_t scan_warp(uint32_t value) {
  CSP_UNROLL
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t below = shuffle_up(value, delta);
    value += lane() >= delta ? below : 0;
  }
  return value;
}

// The sum over the warps below of a value that a warp has in common; `total` becomes the sum over all.
// `scratch` holds kWarps values; it may be used again at once.
template <int kWarps>
CSP_DEVICE uint32_t scan_warps(uint32_t value, Shared<uint32_t> scratch, uint32_t& total) {
  sync_block();
  if (lane() == 0) scratch[warp()] = value;
  sync_block();
  const uint32_t sum = scan_warp(lane() < kWarps ? uint32_t(scratch[lane()]) : 0);
  total = shuffle(sum, 31);
  const uint32_t below = shuffle(sum, warp() - 1);
  return warp() > 0 ? below : 0;
}

// Counts become beginnings, in place: each the sum of all before it. `size` is a multiple of kScanStep and
// the counts are 16-byte aligned; see(four) gets to see them before. For all threads of the block, without a
// barrier at the end.
constexpr int kScanStep = 4 * 32;

template <int kWarps, typename Pointer, typename See>
CSP_DEVICE void scan_counts(Pointer counts, int64_t size, Shared<uint32_t> scratch, See see) {
  const int64_t span = (size + kScanStep * kWarps - 1) / (kScanStep * kWarps) * kScanStep;
  const int64_t begin = warp() * span, end = begin + span < size ? begin + span : size;
  uint32_t sum = 0, total = 0;
  CSP_NO_UNROLL
  for (int64_t step = begin; step < end; step += kScanStep) {
    const Vec<uint32_t, 4> four = load_vec<4>(counts + (step + 4 * lane()));
    sum += four[0] + four[1] + four[2] + four[3];
    see(four);
  }
  uint32_t base = scan_warps<kWarps>(reduce_warp(sum, Add()), scratch, total);
  CSP_NO_UNROLL
  for (int64_t step = begin; step < end; step += kScanStep) {
    Vec<uint32_t, 4> four = load_vec<4>(counts + (step + 4 * lane()));
    const uint32_t own = four[0] + four[1] + four[2] + four[3];
    const uint32_t up_to = scan_warp(own);
    uint32_t next = base + up_to - own;
    base += shuffle(up_to, 31);
    CSP_UNROLL
    for (int e = 0; e < 4; ++e) {
      const uint32_t count = four[e];
      four[e] = next;
      next += count;
    }
    store_vec(counts + (step + 4 * lane()), four);
  }
}

// ---- the best k ----

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kFound = 3;

// Radix select by a block of kThreads threads.
template <int kThreads>
struct Selector {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kScratch = kWarps + kFound;
  static constexpr int kOwn = kDigits / kThreads;  // bins of a thread

  Shared<uint32_t> histogram;  // kDigits zeros, and zeros again afterwards
  Shared<uint32_t> scratch;    // kScratch

  // The smallest bound such that at least `want` of the words are <= it; the words lie below 2^bits, and
  // each(use) calls use(word) for every one of them, on whatever thread. `want` becomes the number that is
  // still to be chosen among the words equal to the bound; 0 where all words up to the bound are wanted, and
  // then the bound need not be a word. Without enough words the bound is above them all.
  template <typename Each>
  CSP_DEVICE uint32_t bound(uint32_t& want, int bits, Each each) const {
    const Shared<uint32_t> found = scratch + kWarps;
    uint32_t prefix = 0;
    CSP_NO_UNROLL
    for (int top = bits; top > 0 && want > 0;) {
      const int shift = top > kDigitBits ? top - kDigitBits : 0;
      const uint32_t above = top < 32 ? ~uint32_t{0} << top : 0;
      const uint32_t digit_mask = (1u << (top - shift)) - 1;
      each([&](uint32_t word) {
        if (((word ^ prefix) & above) == 0) atomic_add(histogram + (word >> shift & digit_mask), 1u);
      });
      sync_block();
      const Vec<uint32_t, kOwn> counts = load_vec<kOwn>(histogram + kOwn * thread());
      store_vec(histogram + kOwn * thread(), Vec<uint32_t, kOwn>{});
      uint32_t own = 0;
      CSP_UNROLL
      for (int i = 0; i < kOwn; ++i) own += counts[i];
      const uint32_t in_warp = scan_warp(own);
      if (lane() == 31) scratch[warp()] = in_warp;
      sync_block();
      const uint32_t warps = scan_warp(lane() < kWarps ? uint32_t(scratch[lane()]) : 0);
      const uint32_t warps_below = shuffle(warps, warp() - 1);
      uint32_t before = in_warp - own + (warp() > 0 ? warps_below : 0);
      const bool last = thread() == kThreads - 1 && before + own < want;
      if ((before < want && want <= before + own) || last) {
        int i = 0;
        uint32_t count = counts[0];
        CSP_UNROLL
        for (int next = 1; next < kOwn; ++next) {
          if (before + count >= want) continue;
          before += count;
          i = next;
          count = counts[next];
        }
        found[0] = kOwn * static_cast<uint32_t>(thread()) + i;
        found[1] = before;
        found[2] = before + count;
      }
      sync_block();
      prefix |= uint32_t(found[0]) << shift;
      const uint32_t below = found[1], up_to = found[2];
      want = want < up_to ? want - below : 0;
      if (want == 0) prefix |= (1u << shift) - 1;
      top = shift;
    }
    return prefix;
  }
};

}  // namespace csp::simt
