#include "csp/dual_top_k.h"
#include "dual_top_k_plan.h"
#include "rank.cuh"
#include "simt.cuh"

namespace csp {
namespace {

using namespace simt;

constexpr int kThreads = kDualTopKThreads;

// An element is among the best k when (key, place) is not behind the cut's.
struct Cut {
  uint32_t key, place;
};

// One list of a row, read kWidth keys at a time.
template <typename T, int kWidth>
struct List {
  Global<const T> scores;
  Global<const uint8_t> valid;  // null: every key
  uint32_t keys;

  // Calls use(group, keys in order) for each group of kWidth keys; a key that is not valid is kAbsent.
  template <typename Use>
  CSP_DEVICE void each_group(Use use) const {
    constexpr uint32_t kInFlight = kWidth < 4 ? 4 : 16 / kWidth;
    const uint32_t groups = keys / kWidth;
    for (uint32_t first = static_cast<uint32_t>(thread()); first < groups; first += kInFlight * kThreads) {
      Vec<T, kWidth> values[kInFlight];
      Vec<uint8_t, kWidth> counts[kInFlight];
      CSP_UNROLL
      for (uint32_t i = 0; i < kInFlight; ++i) {
        const uint32_t group = first + i * kThreads;
        if (group >= groups) continue;
        values[i] = load_readonly<kWidth>(scores + int64_t{group} * kWidth);
        if (valid != nullptr) counts[i] = load_readonly<kWidth>(valid + int64_t{group} * kWidth);
      }
      CSP_UNROLL
      for (uint32_t i = 0; i < kInFlight; ++i) {
        const uint32_t group = first + i * kThreads;
        if (group >= groups) continue;
        Vec<uint32_t, kWidth> ordered;
        CSP_UNROLL
        for (int e = 0; e < kWidth; ++e) {
          ordered[e] = valid == nullptr || counts[i][e] != 0 ? descending(to_float(values[i][e])) : kAbsent;
        }
        use(group, ordered);
      }
    }
  }

  // The later of two equal keys comes first.
  CSP_DEVICE uint32_t place(uint32_t key) const { return keys - 1 - key; }

  CSP_DEVICE Cut best(uint32_t want, const Selector<kThreads>& selector) const {
    Cut cut{0, ~uint32_t{0}};
    if (want == 0) return cut;
    cut.key = selector.bound(want, 32, [&](auto use) {
      each_group([&](uint32_t, const Vec<uint32_t, kWidth>& ordered) {
        CSP_UNROLL
        for (int e = 0; e < kWidth; ++e) {
          if (ordered[e] != kAbsent) use(ordered[e]);
        }
      });
    });
    if (want == 0) return cut;
    cut.place = selector.bound(want, 32 - leading_zeros(keys), [&](auto use) {
      each_group([&](uint32_t group, const Vec<uint32_t, kWidth>& ordered) {
        CSP_UNROLL
        for (int e = 0; e < kWidth; ++e) {
          if (ordered[e] == cut.key) use(place(group * kWidth + e));
        }
      });
    });
    return cut;
  }

  CSP_DEVICE bool chosen(uint32_t ordered, uint32_t key, const Cut& cut) const {
    return ordered != kAbsent && (ordered < cut.key || (ordered == cut.key && place(key) <= cut.place));
  }
};

template <typename T, int kWidth>
CSP_KERNEL(kThreads, 2)
void dual_top_k_kernel(const void* self, const void* cross, const void* valid_self, const void* valid_cross,
                       void* mask, int64_t rows, uint32_t keys, uint32_t k_self, uint32_t k_cross,
                       bool both) {
  CSP_SHARED(uint32_t, histogram, kDigits);
  CSP_SHARED(uint32_t, scratch, Selector<kThreads>::kScratch);
  const Selector<kThreads> selector{histogram, scratch};
  for (int i = thread(); i < kDigits; i += kThreads) selector.histogram[i] = 0;
  sync_block();
  for (int64_t row = block_x(); row < rows; row += grid_x()) {
    const auto list = [&](const void* scores, const void* valid) {
      List<T, kWidth> of{global<T>(scores) + row * keys, nullptr, keys};
      if (valid != nullptr) of.valid = global<uint8_t>(valid) + row * keys;
      return of;
    };
    const List<T, kWidth> own = list(self, valid_self), other = list(cross, valid_cross);
    const Cut cut_self = own.best(k_self, selector), cut_cross = other.best(k_cross, selector);
    const Global<uint8_t> out = global<uint8_t>(mask) + row * keys;
    own.each_group([&](uint32_t group, const Vec<uint32_t, kWidth>& ordered) {
      Vec<uint8_t, kWidth> chosen;
      CSP_UNROLL
      for (int e = 0; e < kWidth; ++e) chosen[e] = own.chosen(ordered[e], group * kWidth + e, cut_self);
      store_vec(out + int64_t{group} * kWidth, chosen);
    });
    // A thread meets the groups that it has just written.
    other.each_group([&](uint32_t group, const Vec<uint32_t, kWidth>& ordered) {
      Vec<uint8_t, kWidth> chosen = load_vec<kWidth>(out + int64_t{group} * kWidth);
      CSP_UNROLL
      for (int e = 0; e < kWidth; ++e) {
        const bool here = other.chosen(ordered[e], group * kWidth + e, cut_cross);
        chosen[e] = both ? here && chosen[e] != 0 : here || chosen[e] != 0;
      }
      store_vec(out + int64_t{group} * kWidth, chosen);
    });
  }
}

}  // namespace

CudaStatus dual_top_k_cuda(const DualTopKParams& p, const CudaContext& context) {
  if (p.rows == 0 || p.keys == 0) return {};
  const LaunchShape shape = dual_top_k_shape(p);
  const auto quota = [&](int64_t k) { return static_cast<uint32_t>(k < p.keys ? k : p.keys); };
  return with_element(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = 16 / sizeof(T);
    const auto aligned = [](const void* pointer, uint64_t bytes) {
      return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
    };
    const bool wide = p.keys % kWidth == 0 && aligned(p.self, 16) && aligned(p.cross, 16) &&
                      aligned(p.valid_self, kWidth) && aligned(p.valid_cross, kWidth) &&
                      aligned(p.mask, kWidth);
    const auto kernel = wide ? dual_top_k_kernel<T, kWidth> : dual_top_k_kernel<T, 1>;
    return launch(context, shape, "dual_top_k_kernel", kernel, p.self, p.cross, p.valid_self, p.valid_cross,
                  p.mask, p.rows, static_cast<uint32_t>(p.keys), quota(p.k_self), quota(p.k_cross),
                  p.combine == Combine::kIntersection);
  });
}

}  // namespace csp
