#pragma once

#include "select_candidates.cuh"
#include "select_plan.h"

// The large path of select: keys and orders in global memory, sorted stably from the last thing to compare by
// to the first, many blocks per row.
namespace csp {
namespace {

using namespace simt;

constexpr int kSortWarps = kSortThreads / 32;
constexpr int kSortDigits = 1 << kSortBits;

// Of a batch row, in words: real keys, candidates, then the observers.
constexpr int kOutlineReal = 0, kOutlineCandidates = 1, kOutlineObservers = 2;
static_assert(kOutlineObservers + kObserverWords <= kOutlineWords);

struct SortArgs {
  SelectParams p;
  SelectPlan plan;
  void* workspace;
  int64_t first_row;  // of the group
  int64_t rows;       // in the group

  template <typename T>
  CSP_DEVICE Global<T> at(int64_t offset) const {
    return global<T>(static_cast<char*>(workspace) + offset);
  }
  CSP_DEVICE Global<int32_t> outline(int64_t row) const {
    return at<int32_t>(plan.layout.outlines) + (first_row + row) / p.score_heads * kOutlineWords;
  }
  CSP_DEVICE Global<int32_t> positions(int64_t row) const {
    return at<int32_t>(plan.layout.positions) + (first_row + row) / p.score_heads * p.keys;
  }
  CSP_DEVICE int candidates(int64_t row) const { return outline(row)[kOutlineCandidates]; }
  CSP_DEVICE Global<uint32_t> tie(int64_t row) const { return at<uint32_t>(plan.layout.tie) + row * p.keys; }
  CSP_DEVICE Global<uint32_t> keys(int list, int64_t row) const {
    return at<uint32_t>(plan.layout.keys) + (list * plan.rows + row) * p.keys;
  }
};

// What a block works on: part of a row, of one of the lists.
struct Part {
  int list;
  int64_t row;
  int64_t tile;
  int begin, end, count;  // of the candidates

  CSP_DEVICE explicit Part(const SortArgs& a) {
    tile = block_x() % a.plan.tiles;
    const int64_t segment = block_x() / a.plan.tiles;
    list = static_cast<int>(segment / a.rows);
    row = segment % a.rows;
    count = a.candidates(row);
    const int64_t first = tile * kSortTile;
    begin = static_cast<int>(first < count ? first : count);
    end = static_cast<int>(first + kSortTile < count ? first + kSortTile : count);
  }

  template <typename Use>
  CSP_DEVICE void each(Use use) const {
    for (int i = begin + thread(); i < end; i += kSortThreads) use(i);
  }
};

// ---- before and after the sorts ----

// One block per batch row: where its real keys stand, and which queries observe.
CSP_KERNEL(1024, 1)
void select_outline_kernel(SortArgs a) {
  constexpr int kWarps = 32;
  CSP_SHARED(int32_t, observer_words, kObserverWords);
  CSP_SHARED(uint32_t, scratch, kWarps);
  const SelectParams& p = a.p;
  const int64_t batch = block_x();
  const Global<const int8_t> modality = global<int8_t>(p.modality) + batch * p.keys;
  const Global<int32_t> outline = a.at<int32_t>(a.plan.layout.outlines) + batch * kOutlineWords;
  const Global<int32_t> positions = a.at<int32_t>(a.plan.layout.positions) + batch * p.keys;
  find_observers(p, batch, observer_words);
  sync_block();
  for (int i = thread(); i < kObserverWords; i += block_threads()) {
    outline[kOutlineObservers + i] = int32_t(observer_words[i]);
  }

  const int64_t span = (p.keys + 32 * kWarps - 1) / (32 * kWarps) * 32;
  const int64_t begin = warp() * span, end = begin + span < p.keys ? begin + span : p.keys;
  const auto real_at = [&](int64_t j) { return j < end && int8_t(modality[j < end ? j : 0]) >= 0; };
  uint32_t here = 0, real = 0;
  for (int64_t strip = begin; strip < end; strip += 32) here += popcount(ballot(real_at(strip + lane())));
  int64_t next = scan_warps<kWarps>(here, scratch, real);
  for (int64_t strip = begin; strip < end; strip += 32) {
    const bool is_real = real_at(strip + lane());
    const uint32_t mask = ballot(is_real);
    if (is_real) positions[next + popcount(mask & lanes_below())] = static_cast<int32_t>(strip + lane());
    next += popcount(mask);
  }
  if (thread() == 0) {
    outline[kOutlineReal] = static_cast<int32_t>(real);
    outline[kOutlineCandidates] = static_cast<int32_t>(size_of_row(p, real).candidates);
  }
}

CSP_DEVICE float score_at(DType dtype, const void* scores, int64_t i) {
  if (dtype == DType::kFloat32) return float(global<float>(scores)[i]);
  if (dtype == DType::kFloat16) return to_float(Half(global<Half>(scores)[i]));
  return to_float(BFloat16(global<BFloat16>(scores)[i]));
}

// The keys of both lists and of self + cross, and a block's share of the lists' sums.
CSP_KERNEL(kSortThreads, 2)
void select_keys_kernel(SortArgs a) {
  CSP_SHARED(double, scratch, kSortWarps);
  const SelectParams& p = a.p;
  const Part part(a);
  const int64_t offset = (a.first_row + part.row) * p.keys;
  const int64_t batch = (a.first_row + part.row) / p.score_heads;
  const Global<const int8_t> modality = global<int8_t>(p.modality) + batch * p.keys;
  const Global<const int32_t> positions = a.positions(part.row);
  const Observers observers{a.outline(part.row) + kOutlineObservers};
  const Global<uint32_t> self = a.keys(0, part.row), cross = a.keys(1, part.row), tie = a.tie(part.row);
  const auto own = [&](int c) { return score_at(p.dtype, p.self, offset + int32_t(positions[c])); };
  const auto other = [&](int c) { return score_at(p.dtype, p.cross, offset + int32_t(positions[c])); };
  const PoolReach reach(p);
  double sum_self = 0, sum_cross = 0;
  part.each([&](int c) {
    const int j = positions[c], m = int8_t(modality[j]);
    float x = own(c), y = other(c);
    tie[c] = descending(x + y);
    if (p.pool != Pool::kNone) {
      const PoolWindow window =
          pool_window(c, part.count, reach, [&](int i) { return int8_t(modality[int32_t(positions[i])]); });
      x = p.pool == Pool::kAvg ? pool_over<Pool::kAvg>(window, own) : pool_over<Pool::kMax>(window, own);
      y = p.pool == Pool::kAvg ? pool_over<Pool::kAvg>(window, other) : pool_over<Pool::kMax>(window, other);
    }
    const bool in_self = observers.of_own(m, j), in_cross = observers.of_others(m, j);
    self[c] = in_self ? descending(x) : kAbsent;
    cross[c] = in_cross ? descending(y) : kAbsent;
    sum_self += in_self && x == x ? x : 0.0f;
    sum_cross += in_cross && y == y ? y : 0.0f;
  });
  if (a.plan.rule != SelectRule::kCalibrated) return;
  sum_self = reduce_block<kSortWarps>(sum_self, Shared<double>(scratch), Add());
  sum_cross = reduce_block<kSortWarps>(sum_cross, Shared<double>(scratch), Add());
  if (thread() > 0) return;
  const Global<double> sums = a.at<double>(a.plan.layout.sums) + 2 * (part.row * a.plan.tiles + part.tile);
  sums[0] = sum_self;
  sums[1] = sum_cross;
}

// The final keys of "calibrated".
CSP_KERNEL(kSortThreads, 2)
void select_calibrate_kernel(SortArgs a) {
  CSP_SHARED(double, scratch, kSortWarps);
  const Part part(a);
  const Global<const double> sums = a.at<double>(a.plan.layout.sums) + 2 * part.row * a.plan.tiles;
  double sum_self = 0, sum_cross = 0;
  for (int64_t tile = thread(); tile < a.plan.tiles; tile += kSortThreads) {
    sum_self += double(sums[2 * tile]);
    sum_cross += double(sums[2 * tile + 1]);
  }
  sum_self = reduce_block<kSortWarps>(sum_self, Shared<double>(scratch), Add());
  sum_cross = reduce_block<kSortWarps>(sum_cross, Shared<double>(scratch), Add());
  const double factor_self = share_factor(sum_self, 1000 - a.p.rho_thousandths);
  const double factor_cross = share_factor(sum_cross, a.p.rho_thousandths);
  const Global<uint32_t> self = a.keys(0, part.row);
  const Global<const uint32_t> cross = a.keys(1, part.row);
  part.each([&](int c) { self[c] = calibrated_key(factor_self, factor_cross, self[c], cross[c]); });
}

// The final keys of the rules that go by ranks. p r of one list is compared with (1000 - p) r of the other;
// the place that it takes among the multiples of both sorts alike and stays below 2^32.
CSP_KERNEL(kSortThreads, 2)
void select_compose_kernel(SortArgs a) {
  const Part part(a);
  const Global<uint32_t> self = a.keys(0, part.row);
  const Global<const uint32_t> cross = a.keys(1, part.row);
  const auto count = static_cast<uint32_t>(part.count);
  const uint32_t last = 2 * count + 1;
  const auto weight = static_cast<uint32_t>(a.p.rho_thousandths);
  const bool unite = a.p.combine == Combine::kUnion;
  const auto among = [&](uint32_t rank, uint32_t weight_here, uint32_t weight_there) {
    const uint64_t there = uint64_t{weight_here} * rank / weight_there;
    return rank + static_cast<uint32_t>(there < count ? there : count);
  };
  part.each([&](int c) {
    const uint32_t own = self[c], other = cross[c];
    uint32_t key = last;
    if (a.plan.rule == SelectRule::kOneList) {
      const uint32_t one = weight == 0 ? own : other, then = weight == 0 ? other : own;
      key = one != kAbsent ? one : then != kAbsent ? count + then : last;
    } else if (own != kAbsent || other != kAbsent) {
      const uint32_t none = unite ? last : 0;
      const uint32_t mine = own == kAbsent ? none : among(own, weight, 1000 - weight);
      const uint32_t theirs = other == kAbsent ? none : among(other, 1000 - weight, weight);
      key = (mine < theirs) == unite ? mine : theirs;
    }
    self[c] = key;
  });
}

// One block per row: the slots, from the ranks that stand in place of the keys.
CSP_KERNEL(1024, 1)
void select_slots_kernel(SortArgs a) {
  constexpr int kWarps = 32;
  CSP_SHARED(uint32_t, scratch, kWarps);
  const SelectParams& p = a.p;
  const int64_t row = block_x();
  const int real = a.outline(row)[kOutlineReal], count = a.candidates(row);
  const RowSize size = size_of_row(p, real);
  const Global<const int32_t> positions = a.positions(row);
  const Global<const uint32_t> self = a.keys(0, row), cross = a.keys(1, row);
  const int span = (real + 32 * kWarps - 1) / (32 * kWarps) * 32;
  const int begin = warp() * span, end = begin + span < real ? begin + span : real;
  const auto kept_at = [&](int c) {
    if (c >= end) return false;
    if (c >= count) return true;
    const int64_t own = uint32_t(self[c]);
    if (a.plan.rule != SelectRule::kLiteral) return own <= size.slots;
    const int64_t other = uint32_t(cross[c]);
    const bool in_self = own <= p.k_self && own != kAbsent, in_cross = other <= p.k_cross && other != kAbsent;
    return p.combine == Combine::kUnion ? in_self || in_cross : in_self && in_cross;
  };
  uint32_t here = 0, kept = 0;
  for (int strip = begin; strip < end; strip += 32) here += popcount(ballot(kept_at(strip + lane())));
  const uint32_t before = scan_warps<kWarps>(here, scratch, kept);
  const Global<int32_t> out = global<int32_t>(p.indices) + (a.first_row + row) * p.budget;
  const int64_t free = p.budget - kept;
  for (int64_t i = thread(); i < free; i += block_threads()) out[i] = -1;
  int64_t slot = free + before;
  for (int strip = begin; strip < end; strip += 32) {
    const bool keep = kept_at(strip + lane());
    const uint32_t mask = ballot(keep);
    const int64_t at = slot + popcount(mask & lanes_below());
    if (keep && at >= 0) out[at] = int32_t(positions[strip + lane()]);
    slot += popcount(mask);
  }
  if (thread() == 0) global<int32_t>(p.lengths)[a.first_row + row] = static_cast<int32_t>(kept);
}

// ---- one pass of a stable sort by 8 bits of the keys ----

struct SortPass {
  int64_t keys;         // offsets into the workspace: [lists, rows, L], at list * rows of the plan
  int64_t from;         // an order, or below 0 for the candidates from the last to the first
  bool from_is_shared;  // one order for all lists
  int64_t to;           // the order afterwards
  int32_t shift;
};

struct Sorting {
  Global<const uint32_t> keys, from;
  Global<uint32_t> to, counts;  // counts of this tile: one for each digit, a.plan.tiles apart
  bool reversed;

  CSP_DEVICE Sorting(const SortArgs& a, const SortPass& pass, const Part& part) {
    const int64_t segment = part.list * a.plan.rows + part.row;
    reversed = pass.from < 0;
    keys = a.at<uint32_t>(pass.keys) + segment * a.p.keys;
    from = a.at<uint32_t>(reversed ? pass.to : pass.from) +
           (pass.from_is_shared ? part.row : segment) * a.p.keys;
    to = a.at<uint32_t>(pass.to) + segment * a.p.keys;
    counts = a.at<uint32_t>(a.plan.layout.counts) + segment * a.plan.tiles * kSortDigits + part.tile;
  }
  CSP_DEVICE uint32_t element(const Part& part, int i) const {
    return reversed ? static_cast<uint32_t>(part.count - 1 - i) : uint32_t(from[i]);
  }
  CSP_DEVICE int digit(uint32_t element, int shift) const {
    return static_cast<int>(uint32_t(keys[element]) >> shift & (kSortDigits - 1));
  }
};

CSP_KERNEL(kSortThreads, 4)
void select_count_kernel(SortArgs a, SortPass pass) {
  static_assert(kSortThreads == kSortDigits);
  CSP_SHARED(uint32_t, histogram, kSortDigits);
  const Part part(a);
  const Sorting sorting(a, pass, part);
  histogram[thread()] = 0;
  sync_block();
  part.each([&](int i) { atomic_add(histogram + sorting.digit(sorting.element(part, i), pass.shift), 1u); });
  sync_block();
  sorting.counts[thread() * a.plan.tiles] = uint32_t(histogram[thread()]);
}

// One block per row and list: the counts, digit by digit and tile by tile, become beginnings.
CSP_KERNEL(1024, 1)
void select_scan_kernel(SortArgs a) {
  constexpr int kWarps = 32;
  CSP_SHARED(uint32_t, scratch, kWarps);
  const int64_t segment = block_x() / a.rows * a.plan.rows + block_x() % a.rows;
  const int64_t size = a.plan.tiles * kSortDigits;
  const Global<uint32_t> counts = a.at<uint32_t>(a.plan.layout.counts) + segment * size;
  scan_counts<kWarps>(counts, size, Shared<uint32_t>(scratch), [](const Vec<uint32_t, 4>&) {});
}

CSP_KERNEL(kSortThreads, 2)
void select_move_kernel(SortArgs a, SortPass pass) {
  constexpr int kStrips = kSortTile / kSortThreads;
  CSP_SHARED(uint32_t, starts, kSortWarps* kSortDigits);
  const Part part(a);
  const Sorting sorting(a, pass, part);
  const Shared<uint32_t> own = starts + warp() * kSortDigits;
  for (int i = thread(); i < kSortWarps * kSortDigits; i += kSortThreads) starts[i] = 0;
  sync_block();
  // A warp takes kStrips strips in a row, so that equal digits stay in order.
  uint32_t elements[kStrips];
  int digits[kStrips];  // kSortDigits: none
  CSP_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    const int i = part.begin + (warp() * kStrips + s) * 32 + lane();
    elements[s] = i < part.end ? sorting.element(part, i) : 0;
    digits[s] = i < part.end ? sorting.digit(elements[s], pass.shift) : kSortDigits;
    if (digits[s] < kSortDigits) atomic_add(own + digits[s], 1u);
  }
  sync_block();
  uint32_t next = sorting.counts[thread() * a.plan.tiles];
  CSP_UNROLL
  for (int w = 0; w < kSortWarps; ++w) {
    const uint32_t size = starts[w * kSortDigits + thread()];
    starts[w * kSortDigits + thread()] = next;
    next += size;
  }
  sync_block();
  CSP_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    const uint32_t equal = match_any(static_cast<uint32_t>(digits[s]));
    const bool there = digits[s] < kSortDigits;
    const uint32_t begin = there ? uint32_t(own[digits[s]]) : 0;
    if (there) sorting.to[begin + popcount(equal & lanes_below())] = elements[s];
    sync_warp();
    if (there && (equal & lanes_below()) == 0) own[digits[s]] = begin + popcount(equal);
    sync_warp();
  }
}

// A list's keys become its ranks from 1 on; an absent key stays.
CSP_KERNEL(kSortThreads, 4)
void select_rank_kernel(SortArgs a, int64_t order) {
  const Part part(a);
  const Global<uint32_t> keys = a.keys(part.list, part.row);
  const Global<const uint32_t> in_order =
      a.at<uint32_t>(order) + (part.list * a.plan.rows + part.row) * a.p.keys;
  part.each([&](int i) {
    const uint32_t c = in_order[i];
    if (uint32_t(keys[c]) != kAbsent) keys[c] = static_cast<uint32_t>(i) + 1;
  });
}

// ---- the launches ----

class SortLauncher {
 public:
  SortLauncher(const SelectParams& p, const SelectPlan& plan, const CudaContext& context)
      : context_(context), args_{p, plan, context.workspace, 0, 0} {}

  CudaStatus run() {
    const SelectPlan& plan = args_.plan;
    const int64_t rows = args_.p.batch * args_.p.score_heads;
    launch_one({args_.p.batch, 1, 1, 1024}, "select_outline_kernel", select_outline_kernel, args_);
    for (args_.first_row = 0; args_.first_row < rows; args_.first_row += plan.rows) {
      const int64_t left = rows - args_.first_row;
      args_.rows = left < plan.rows ? left : plan.rows;
      group();
    }
    return status_;
  }

 private:
  void group() {
    const SelectPlan& plan = args_.plan;
    const SortLayout& at = plan.layout;
    launch_one(tiles(1), "select_keys_kernel", select_keys_kernel, args_);
    // Every second pass ends in tie_order, and the fourth is the last.
    sort(at.tie, 1, -1, true, at.orders[0], at.tie_order, 4);
    if (plan.rule == SelectRule::kCalibrated) {
      launch_one(tiles(1), "select_calibrate_kernel", select_calibrate_kernel, args_);
    }
    const auto rank = [&](int64_t lists, int32_t passes) {
      const int64_t order = sort(at.keys, lists, at.tie_order, true, at.orders[0], at.orders[1], passes);
      launch_one(tiles(lists), "select_rank_kernel", select_rank_kernel, args_, order);
    };
    rank(plan.lists, 4);
    if (plan.rule == SelectRule::kRanks || plan.rule == SelectRule::kOneList) {
      launch_one(tiles(1), "select_compose_kernel", select_compose_kernel, args_);
      rank(1, plan.final_passes);
    }
    launch_one({args_.rows, 1, 1, 1024}, "select_slots_kernel", select_slots_kernel, args_);
  }

  // Sorts `from` (below 0: the last candidate first) by keys; returns which of the two buffers has the
  // result.
  int64_t sort(int64_t keys, int64_t lists, int64_t from, bool from_is_shared, int64_t odd, int64_t even,
               int32_t passes) {
    for (int32_t i = 0; i < passes; ++i) {
      const SortPass pass{keys, from, from_is_shared, i % 2 == 0 ? odd : even, kSortBits * i};
      launch_one(tiles(lists), "select_count_kernel", select_count_kernel, args_, pass);
      launch_one({lists * args_.rows, 1, 1, 1024}, "select_scan_kernel", select_scan_kernel, args_);
      launch_one(tiles(lists), "select_move_kernel", select_move_kernel, args_, pass);
      from = pass.to;
      from_is_shared = false;
    }
    return from;
  }

  LaunchShape tiles(int64_t lists) const {
    return {lists * args_.rows * args_.plan.tiles, 1, 1, kSortThreads};
  }

  // Nothing more is launched after a failure.
  template <typename Kernel, typename... Arguments>
  void launch_one(const LaunchShape& shape, const char* name, Kernel kernel, const Arguments&... arguments) {
    if (status_.ok()) status_ = launch(context_, shape, name, kernel, arguments...);
  }

  const CudaContext& context_;
  SortArgs args_;
  CudaStatus status_;
};

}  // namespace
}  // namespace csp
