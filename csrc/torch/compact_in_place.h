#pragma once

#include <algorithm>
#include <vector>

#include "compact.h"

// Shared by compact_ and prune_: whether key and value have memory of their own.

namespace csp {

// One of the batch, head and row dimensions of a cache.
struct Step {
  int64_t stride;
  int64_t size;

  bool operator==(const Step&) const = default;
};

// Those of more than one element, by stride.
inline std::vector<Step> steps_of(const Tensor& t) {
  std::vector<Step> steps;
  for (int64_t dim = 0; dim < 3; ++dim) {
    if (t.size(dim) > 1) steps.push_back({t.stride(dim), t.size(dim)});
  }
  std::sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.stride < b.stride; });
  return steps;
}

// The elements from the first to the last of a cache; 0 where a dimension steps into what the smaller ones
// span. Tensors that were cut out of a contiguous one never do.
inline int64_t span_of(const Tensor& t) {
  int64_t span = t.size(3);
  for (const auto& [stride, size] : steps_of(t)) {
    if (stride < span) return 0;
    span += stride * (size - 1);
  }
  return span;
}

// Whether two caches of known spans keep apart: one after the other, or the rows, heads or batches of one in
// the gaps of the other's, as halves of a wider tensor do.
inline bool apart(const Tensor& key, const Tensor& value) {
  const auto at = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  const Tensor &low = at(key) < at(value) ? key : value, &high = at(key) < at(value) ? value : key;
  const uintptr_t bytes = at(high) - at(low), element = key.element_size();
  if (bytes >= static_cast<uintptr_t>(span_of(low)) * element) return true;

  const std::vector<Step> steps = steps_of(low);
  if (bytes % element != 0 || steps != steps_of(high)) return false;
  const auto distance = static_cast<int64_t>(bytes / element);
  int64_t low_span = low.size(3), high_span = high.size(3);
  for (const auto& [stride, size] : steps) {
    if (stride > distance) return low_span <= distance && distance + high_span <= stride;
    low_span += stride * (size - 1);
    high_span += stride * (size - 1);
  }
  return false;
}

inline void check_own_memory(const char* op, const Tensor& key, const Tensor& value) {
  const auto check_one = [&](const char* name, const Tensor& t) {
    CSP_CHECK(span_of(t) > 0, op, name, " must have elements that share no memory, got strides ",
              shape_of(t.strides()), " for shape ", shape_of(t));
  };
  if (key.numel() > 0) check_one("key", key);
  if (value.numel() > 0) check_one("value", value);
  if (key.numel() == 0 || value.numel() == 0) return;
  CSP_CHECK(apart(key, value), op, "value must be clear of key in memory, or its like beside it in a wider ",
            "tensor, got tensors that overlap");
}

}  // namespace csp
