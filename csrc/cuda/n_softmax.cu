#include <cmath>

#include "n_softmax_plan.h"
#include "reduce.cuh"
#include "simt.cuh"

namespace csp {
namespace {

using namespace simt;

// log n in two floats: what rounding takes from the first is in the second.
struct LogN {
  float high;
  float low;
};

CSP_DEVICE float exp_of(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return exp2_approx(x * kLog2E);
}

// What exponents may be taken relative to: -inf - -inf would be NaN.
CSP_DEVICE float anchor(float top) {
  return top == -INFINITY ? 0.0f : top;
}

// sum = the sum of exp(x - anchor(top)) over some values x, top = the largest of them. A NaN, or a top of
// +inf, makes the sum NaN.
struct Part {
  float top = -INFINITY;
  float sum = 0;
};

// The factor that takes sums relative to `from` to ones relative to `to` >= `from`.
CSP_DEVICE float rescale(float from, float to) {
  return exp_of(from - anchor(to));
}

CSP_DEVICE Part combine_warp(const Part& mine) {
  const float top = reduce_warp(mine.top, Max());
  return {top, reduce_warp(mine.sum * rescale(mine.top, top), Add())};
}

// The part of a whole row, known to each thread of its team, from the parts of these threads.
template <int kTeam>
CSP_DEVICE Part combine(const Part& mine) {
  const Part part = combine_warp(mine);
  if constexpr (kTeam == 32) {
    return part;
  } else {
    constexpr int kWarps = kTeam / 32;
    CSP_SHARED(float, tops, kWarps);
    CSP_SHARED(float, sums, kWarps);
    if (lane() == 0) tops[warp()] = part.top, sums[warp()] = part.sum;
    sync_block();
    const bool has = lane() < kWarps;
    return combine_warp({has ? float(tops[lane()]) : -INFINITY, has ? float(sums[lane()]) : 0.0f});
  }
}

// exp(x - anchor(top)) times this is the result. n e^-shift as e^(log n - shift): for n = 0 or a tiny n the
// product would be 0 * inf.
CSP_DEVICE float scale_of(const Part& row, float top, const LogN& log_n) {
  const float shift = anchor(fmaxf(row.top, log_n.high));
  const float total = row.sum * rescale(row.top, shift) + exp_of(log_n.high - shift + log_n.low);
  const float inverse = total == 0 ? 0 : 1 / total;  // a NaN goes on to the whole row
  return rescale(top, shift) * inverse;
}

// A row as whole, aligned vectors of kWidth elements, and the edges before and behind them: fewer than 2
// kWidth elements, one for each of the first threads of a team.
template <typename T, int kWidth, typename Index>
class Row {
 public:
  CSP_DEVICE Row(const void* logits, void* out, int64_t begin, int64_t cols, int lead, int rank)
      : x_(global<T>(logits) + begin), y_(global<T>(out) + begin) {
    const auto count = static_cast<Index>(cols);
    const auto past = static_cast<uint32_t>(lead) + static_cast<uint32_t>(begin);  // the boundary before
    const Index to_boundary = static_cast<int>((0u - past) & (kWidth - 1));
    head_ = to_boundary < count ? to_boundary : count;
    vectors_ = (count - head_) / kWidth;
    edge_ = rank < kWidth ? rank : head_ + vectors_ * kWidth + rank - kWidth;
    has_edge_ = rank < kWidth ? rank < head_ : rank < 2 * kWidth && edge_ < count;
  }

  CSP_DEVICE Index vectors() const { return vectors_; }

  // All -inf where there is no such vector. kLast: it is not needed any more.
  template <bool kLast>
  CSP_DEVICE void load(Index vector, float (&values)[kWidth]) const {
    CSP_UNROLL
    for (int e = 0; e < kWidth; ++e) values[e] = -INFINITY;
    if (vector >= vectors_) return;
    const Global<const T> from = x_ + (head_ + vector * kWidth);
    const Vec<T, kWidth> raw = kLast ? load_streaming<kWidth>(from) : load_vec<kWidth>(from);
    CSP_UNROLL
    for (int e = 0; e < kWidth; ++e) values[e] = to_float(raw[e]);
  }
  CSP_DEVICE float load_edge() const { return has_edge_ ? to_float(T(x_[edge_])) : -INFINITY; }

  CSP_DEVICE void store(Index vector, const float (&values)[kWidth]) const {
    if (vector >= vectors_) return;
    const Global<T> to = y_ + (head_ + vector * kWidth);
    if constexpr (sizeof(T) == 2 && kWidth > 1) {
      Vec<uint32_t, kWidth / 2> raw;
      CSP_UNROLL
      for (int e = 0; e < kWidth / 2; ++e) raw[e] = pack2<T>(values[2 * e], values[2 * e + 1]);
      store_vec<kWidth / 2>(as<uint32_t>(to), raw);
    } else {
      Vec<T, kWidth> raw;
      CSP_UNROLL
      for (int e = 0; e < kWidth; ++e) raw[e] = from_float<T>(values[e]);
      store_vec<kWidth>(to, raw);
    }
  }
  CSP_DEVICE void store_edge(float value) const {
    if (has_edge_) y_[edge_] = from_float<T>(value);
  }

 private:
  Global<const T> x_;
  Global<T> y_;
  Index head_;
  Index vectors_;
  Index edge_;
  bool has_edge_;
};

template <int kVectors, int kWidth>
CSP_DEVICE float highest(const float (&x)[kVectors][kWidth], float top) {
  CSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    CSP_UNROLL
    for (int e = 0; e < kWidth; ++e) top = fmaxf(top, x[v][e]);
  }
  return top;
}

// x becomes exp(x - base).
template <int kWidth>
CSP_DEVICE void exponentiate(float (&x)[kWidth], float base) {
  CSP_UNROLL
  for (int e = 0; e < kWidth; ++e) x[e] = exp_of(x[e] - base);
}

template <int kWidth>
CSP_DEVICE float sum_of(const float (&x)[kWidth]) {
  float sum = 0;
  CSP_UNROLL
  for (int e = 0; e < kWidth; ++e) sum += x[e];
  return sum;
}

template <int kWidth>
CSP_DEVICE void multiply(float (&x)[kWidth], float by) {
  CSP_UNROLL
  for (int e = 0; e < kWidth; ++e) x[e] *= by;
}

// Rows that fit into the registers of a team.
template <typename T, int kTier>
CSP_KERNEL(kNSoftmaxTiers[kTier].threads, kNSoftmaxTiers[kTier].blocks)
void n_softmax_held(const void* logits, void* out, int64_t rows, int64_t cols, int lead, LogN log_n) {
  constexpr NSoftmaxTier kShape = kNSoftmaxTiers[kTier];
  constexpr int kTeam = kShape.team, kTeams = kShape.threads / kTeam;
  constexpr int kWidth = 16 / sizeof(T), kVectors = kShape.values / kWidth;
  const int rank = thread() % kTeam;
  const int64_t r = block_x() * kTeams + thread() / kTeam;
  if (r >= rows) return;  // a whole team
  const Row<T, kWidth, int> row(logits, out, r * cols, cols, lead, rank);
  float x[kVectors][kWidth];
  CSP_UNROLL
  for (int v = 0; v < kVectors; ++v) row.template load<true>(v * kTeam + rank, x[v]);
  float edge = row.load_edge();

  Part mine;
  mine.top = highest(x, edge);
  const float base = anchor(mine.top);
  edge = exp_of(edge - base);
  mine.sum = edge;
  CSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    exponentiate(x[v], base);
    mine.sum += sum_of(x[v]);
  }

  const float scale = scale_of(combine<kTeam>(mine), mine.top, log_n);
  row.store_edge(edge * scale);
  CSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    multiply(x[v], scale);
    row.store(v * kTeam + rank, x[v]);
  }
}

// Rows of any length, a block each: once for the sum, once more for the result.
template <typename T, int kWidth>
CSP_KERNEL(kNSoftmaxLongThreads, 2)
void n_softmax_long(const void* logits, void* out, int64_t rows, int64_t cols, int lead, LogN log_n) {
  constexpr int kThreads = kNSoftmaxLongThreads, kVectors = kWidth > 1 ? 4 : 8;
  for (int64_t r = block_x(); r < rows; r += grid_x()) {
    const Row<T, kWidth, int64_t> row(logits, out, r * cols, cols, lead, thread());
    const float edge = row.load_edge();
    Part mine{edge, exp_of(edge - anchor(edge))};
    float x[kVectors][kWidth];
    for (int64_t first = thread(); first < row.vectors(); first += kThreads * kVectors) {
      CSP_UNROLL
      for (int v = 0; v < kVectors; ++v) row.template load<false>(first + v * kThreads, x[v]);
      const float top = highest(x, mine.top);
      mine.sum *= rescale(mine.top, top);
      mine.top = top;
      CSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        exponentiate(x[v], anchor(top));
        mine.sum += sum_of(x[v]);
      }
    }

    const Part all = combine<kThreads>(mine);
    const float base = anchor(all.top), scale = scale_of(all, all.top, log_n);
    row.store_edge(exp_of(edge - base) * scale);
    for (int64_t first = thread(); first < row.vectors(); first += kThreads * kVectors) {
      CSP_UNROLL
      for (int v = 0; v < kVectors; ++v) row.template load<true>(first + v * kThreads, x[v]);
      CSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        exponentiate(x[v], base);
        multiply(x[v], scale);
        row.store(first + v * kThreads, x[v]);
      }
    }
    sync_block();  // the next row takes the same shared memory
  }
}

template <typename T, int kTier = 0>
CudaStatus launch_tier(const NSoftmaxParams& p, const NSoftmaxCut& cut, const LogN& log_n,
                       const CudaContext& context) {
  if constexpr (kTier < kNSoftmaxTierCount) {
    if (cut.tier != kTier) return launch_tier<T, kTier + 1>(p, cut, log_n, context);
  }
  LaunchShape shape;
  shape.x = cut.blocks;
  const auto run = [&](const char* name, auto kernel) {
    return launch(context, shape, name, kernel, p.logits, p.out, p.rows, p.cols, cut.lead, log_n);
  };
  if constexpr (kTier < kNSoftmaxTierCount) {
    shape.threads = kNSoftmaxTiers[kTier].threads;
    return run("n_softmax_held", n_softmax_held<T, kTier>);
  } else {
    shape.threads = kNSoftmaxLongThreads;
    return cut.vectors ? run("n_softmax_long", n_softmax_long<T, 16 / sizeof(T)>)
                       : run("n_softmax_long", n_softmax_long<T, 1>);
  }
}

}  // namespace

CudaStatus n_softmax_cuda(const NSoftmaxParams& p, const CudaContext& context) {
  const NSoftmaxCut cut = n_softmax_cut(p, context.device);
  const double log = p.n > 0 ? std::log(p.n) : -INFINITY;
  const auto high = static_cast<float>(log);
  const LogN log_n = {high, p.n > 0 ? static_cast<float>(log - high) : 0.0f};
  return with_element(p.dtype, [&](auto tag) -> CudaStatus {
    if (cut.blocks == 0) return {};
    return launch_tier<typename decltype(tag)::type>(p, cut, log_n, context);
  });
}

}  // namespace csp
