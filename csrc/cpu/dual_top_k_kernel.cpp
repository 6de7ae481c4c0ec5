#include "dual_top_k_kernel.h"

#include "rank.h"

namespace csp::CSP_ISA {
namespace {

// Calls chosen(key) for the best k valid keys of one list. valid null: every key.
template <typename Real, typename T, typename Chosen>
void top_k(const T* scores, const bool* valid, int64_t keys, int64_t k, const DualTopKScratch& s,
           Chosen&& chosen) {
  auto* const entries = static_cast<Entry<Real>*>(s.entries[0]);
  auto* const other = static_cast<Entry<Real>*>(s.entries[1]);
  const Real* const no_tie = nullptr;
  const int64_t size = rank_best(scores, no_tie, keys, k, entries, other, s.order,
                                 [&](int64_t key) { return !valid || valid[key]; });
  for (int64_t i = 0; i < size; ++i) chosen(s.order[i]);
}

template <typename T, typename Real>
void row_of(const DualTopKParams& p, int64_t row, const DualTopKScratch& s) {
  const int64_t offset = row * p.keys;
  const auto* const self = static_cast<const T*>(p.self) + offset;
  const auto* const cross = static_cast<const T*>(p.cross) + offset;
  const bool* const valid_self = p.valid_self ? p.valid_self + offset : nullptr;
  const bool* const valid_cross = p.valid_cross ? p.valid_cross + offset : nullptr;
  bool* const mask = p.mask + offset;

  for (int64_t key = 0; key < p.keys; ++key) mask[key] = false;
  top_k<Real>(self, valid_self, p.keys, p.k_self, s, [&](int32_t key) { mask[key] = true; });
  if (p.combine == Combine::kUnion) {
    top_k<Real>(cross, valid_cross, p.keys, p.k_cross, s, [&](int32_t key) { mask[key] = true; });
    return;
  }
  // The keys of both lists stay behind in `order`, and then alone in the mask.
  int64_t both = 0;
  top_k<Real>(cross, valid_cross, p.keys, p.k_cross, s, [&](int32_t key) {
    s.order[both] = key;
    both += mask[key];
  });
  for (int64_t key = 0; key < p.keys; ++key) mask[key] = false;
  for (int64_t i = 0; i < both; ++i) mask[s.order[i]] = true;
}

}  // namespace

void dual_top_k_row(const DualTopKParams& params, int64_t row, const DualTopKScratch& scratch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return row_of<float, float>(params, row, scratch);
    case DType::kFloat16:
      return row_of<Float16, float>(params, row, scratch);
    case DType::kBFloat16:
      return row_of<BFloat16, float>(params, row, scratch);
    case DType::kFloat64:
      return row_of<double, double>(params, row, scratch);
  }
}

}  // namespace csp::CSP_ISA
