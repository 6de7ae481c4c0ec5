#include "select_kernel.h"

#include "rank.h"
#include "select_candidates.h"

namespace csp::CSP_ISA {
namespace {

constexpr int64_t kFar = INT64_MAX;

template <typename Real>
struct Head {
  const SelectScratch& s;
  int64_t count;
  int64_t left;  // slots to fill
  Real* self;    // pooled
  Real* cross;   // pooled
  const Real* tie;

  // The best `want` candidates by `values` whose valid bits pass.
  template <typename Valid>
  int64_t rank(const Real* values, const Real* ties, int64_t want, int list, Valid&& valid) const {
    return rank_best(values, ties, count, want, static_cast<Entry<Real>*>(s.entries[0]),
                     static_cast<Entry<Real>*>(s.entries[1]), s.order[list],
                     [&](int64_t c) { return valid(s.valid[c]); });
  }
  int64_t rank_self(int64_t want) const {
    return rank(self, tie, want, 0, [](uint8_t valid) { return (valid & kSelf) != 0; });
  }
  int64_t rank_cross(int64_t want) const {
    return rank(cross, tie, want, 1, [](uint8_t valid) { return (valid & kCross) != 0; });
  }

  bool before(int32_t a, int32_t b) const {
    const auto key_a = descending(tie[a]), key_b = descending(tie[b]);
    return key_a < key_b || (key_a == key_b && a > b);
  }
  void take(int32_t c) {
    if (left == 0 || s.state[c] & kChosen) return;
    s.state[c] |= kChosen;
    --left;
  }
  void take_all(const int32_t* order, int64_t size) {
    for (int64_t i = 0; i < size; ++i) take(order[i]);
  }

  // Walks both lists by ascending p r^s and (1000 - p) r^c and calls meet(self, cross) with the candidates
  // that stand there, -1 for none, until every slot is filled.
  template <typename Meet>
  void merge(int64_t p, int64_t self_size, int64_t cross_size, Meet&& meet) {
    for (int64_t i = 0, j = 0; left > 0 && (i < self_size || j < cross_size);) {
      const int64_t key_self = i < self_size ? p * (i + 1) : kFar;
      const int64_t key_cross = j < cross_size ? (1000 - p) * (j + 1) : kFar;
      const int32_t a = key_self <= key_cross ? s.order[0][i++] : -1;
      const int32_t b = key_cross <= key_self ? s.order[1][j++] : -1;
      meet(a, b);
    }
  }
  void take_both(int32_t a, int32_t b) {
    if (a >= 0 && b >= 0 && before(b, a)) {
      take(b);
      take(a);
      return;
    }
    if (a >= 0) take(a);
    if (b >= 0) take(b);
  }

  void unite(int64_t p) {
    // The k smallest keys never reach beyond rank k of a list.
    const int64_t self_size = rank_self(left), cross_size = rank_cross(left);
    merge(p, self_size, cross_size, [&](int32_t a, int32_t b) { take_both(a, b); });
  }

  void intersect(int64_t p) {
    // A candidate enters when it was met in every list that it is valid in.
    const auto met = [&](int32_t c, uint8_t list) {
      if (c < 0) return int32_t{-1};
      s.state[c] |= list;
      return (s.state[c] & (kSelf | kCross)) == s.valid[c] ? c : int32_t{-1};
    };
    const int64_t self_size = rank_self(count), cross_size = rank_cross(count);
    merge(p, self_size, cross_size, [&](int32_t a, int32_t b) {
      const int32_t first = met(a, kSelf);
      take_both(first, met(b, kCross));
    });
  }

  void one_list(bool by_cross) {
    const uint8_t only_second = by_cross ? kSelf : kCross;
    take_all(s.order[by_cross], by_cross ? rank_cross(left) : rank_self(left));
    const auto rest = [&](uint8_t valid) { return valid == only_second; };
    take_all(s.order[!by_cross], rank(by_cross ? self : cross, tie, left, !by_cross, rest));
  }

  // weight / sum over the candidates valid in the list; 0 drops a list whose sum is 0.
  double factor(const Real* values, uint8_t list, int64_t weight) const {
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) {
      const double value = s.valid[c] & list ? values[c] : 0;
      sum += value == value ? value : 0;
    }
    return sum > 0 ? static_cast<double>(weight) / sum : 0;
  }

  void calibrate(int64_t p) {
    const double factor_self = factor(self, kSelf, 1000 - p), factor_cross = factor(cross, kCross, p);
    // An infinite score stays one, though its share of an infinite sum is not a number.
    const auto share = [](double by, Real x) { return x - x == 0 ? static_cast<Real>(by * x) : x; };
    for (int64_t c = 0; c < count; ++c) {
      const Real own = s.valid[c] & kSelf ? share(factor_self, self[c]) : Real{0};
      const Real other = s.valid[c] & kCross ? share(factor_cross, cross[c]) : Real{0};
      self[c] = own + other;
    }
    const auto any = [](uint8_t valid) { return valid != 0; };
    take_all(s.order[0], rank(self, tie, left, 0, any));
  }

  void exact(int64_t p, Combine combine) {
    if (p == 0 || p == 1000) {
      one_list(p == 1000);
    } else if (combine == Combine::kUnion) {
      unite(p);
    } else if (combine == Combine::kIntersection) {
      intersect(p);
    } else {
      calibrate(p);
    }
    if (left == 0) return;
    const auto neither = [](uint8_t valid) { return valid == 0; };
    take_all(s.order[0], rank(tie, nullptr, left, 0, neither));
  }

  void literal(const SelectParams& p) {
    const int64_t self_size = rank_self(p.k_self), cross_size = rank_cross(p.k_cross);
    for (int64_t i = 0; i < self_size; ++i) s.state[s.order[0][i]] |= kSelf;
    for (int64_t i = 0; i < cross_size; ++i) s.state[s.order[1][i]] |= kCross;
    for (int64_t c = 0; c < count; ++c) {
      const bool chosen = p.combine == Combine::kUnion ? s.state[c] != 0 : s.state[c] == (kSelf | kCross);
      if (chosen) take(static_cast<int32_t>(c));
    }
  }
};

// Right-aligned and ascending: recents, then chosen candidates, from the last slot on; -1 in the others.
int64_t write_slots(const SelectParams& p, const int8_t* modality, const Candidates& candidates,
                    int64_t chosen, const SelectScratch& s, int32_t* out) {
  int64_t slot = p.budget;
  for (int64_t j = p.keys - 1; j >= candidates.first_recent; --j) {
    if (modality[j] >= 0) out[--slot] = static_cast<int32_t>(j);
  }
  for (int64_t c = candidates.count - 1; chosen > 0; --c) {
    if (!(s.state[c] & kChosen)) continue;
    out[--slot] = s.position[c];
    --chosen;
  }
  for (int64_t free = 0; free < slot; ++free) out[free] = -1;
  return p.budget - slot;
}

template <typename T, typename Real>
void heads_of(const SelectParams& p, int64_t batch, int64_t head_begin, int64_t head_end,
              const SelectScratch& s) {
  const int8_t* const modality = p.modality + batch * p.keys;
  const Candidates candidates = candidates_of(p, modality, p.query_modality + batch * p.window, s);
  const int64_t count = candidates.count;
  Real* const self = static_cast<Real*>(s.self);
  Real* const cross = static_cast<Real*>(s.cross);
  Real* const tie = static_cast<Real*>(s.tie);
  Head<Real> head{s, count, 0, static_cast<Real*>(s.pooled_self), static_cast<Real*>(s.pooled_cross), tie};

  for (int64_t row = batch * p.score_heads + head_begin; row < batch * p.score_heads + head_end; ++row) {
    const T* const all_self = static_cast<const T*>(p.self) + row * p.keys;
    const T* const all_cross = static_cast<const T*>(p.cross) + row * p.keys;
    for (int64_t c = 0; c < count; ++c) {
      self[c] = to_float(all_self[s.position[c]]);
      cross[c] = to_float(all_cross[s.position[c]]);
      tie[c] = self[c] + cross[c];
      s.state[c] = 0;
    }
    if (p.pool != Pool::kNone) {
      pool_runs(p, modality, s.position, count, self, head.self);
      pool_runs(p, modality, s.position, count, cross, head.cross);
    }
    const int64_t slots = p.budget - p.recent < count ? p.budget - p.recent : count;
    head.left = slots;
    if (p.k_self >= 0) {
      head.literal(p);
    } else if (slots > 0) {
      head.exact(p.rho_thousandths, p.combine);
    }
    p.lengths[row] = static_cast<int32_t>(
        write_slots(p, modality, candidates, slots - head.left, s, p.indices + row * p.budget));
  }
}

}  // namespace

void select_heads(const SelectParams& params, int64_t batch, int64_t head_begin, int64_t head_end,
                  const SelectScratch& scratch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return heads_of<float, float>(params, batch, head_begin, head_end, scratch);
    case DType::kFloat16:
      return heads_of<Float16, float>(params, batch, head_begin, head_end, scratch);
    case DType::kBFloat16:
      return heads_of<BFloat16, float>(params, batch, head_begin, head_end, scratch);
    case DType::kFloat64:
      return heads_of<double, double>(params, batch, head_begin, head_end, scratch);
  }
}

}  // namespace csp::CSP_ISA
