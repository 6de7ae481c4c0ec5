#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "csp/select.h"

namespace csp {

// The options that select, prune and prune_ share, as their schemas pass them.
struct SelectOptions {
  int64_t budget;
  std::optional<int64_t> recent;
  double cross_ratio;
  std::string combine;
  std::optional<int64_t> k_self;
  std::optional<int64_t> k_cross;
  std::string pool;
  int64_t pool_kernel;
  bool causal;
};

inline void check_quotas(const char* op, const SelectOptions& options, const SelectParams& params) {
  CSP_CHECK(options.k_self.has_value() == options.k_cross.has_value(), op,
            "k_self and k_cross go together, got only ",
            options.k_self ? "k_self = " : "k_cross = ", options.k_self ? *options.k_self : *options.k_cross);
  if (!options.k_self) return;
  const int64_t k_self = *options.k_self, k_cross = *options.k_cross;
  CSP_CHECK(k_self >= 0, op, "k_self must be >= 0, got ", k_self);
  CSP_CHECK(k_cross >= 0, op, "k_cross must be >= 0, got ", k_cross);
  CSP_CHECK(
      params.combine != Combine::kCalibrated, op,
      "combine must be \"intersection\" or \"union\" where k_self and k_cross are given, got \"calibrated\"");
  const int64_t room = params.budget - params.recent;
  const bool fits = params.combine == Combine::kUnion ? k_self <= room && k_cross <= room - k_self
                                                      : k_self <= room || k_cross <= room;
  CSP_CHECK(fits, op, "k_self and k_cross must leave room for recent = ", params.recent,
            " in budget = ", params.budget, ", got k_self = ", k_self, " and k_cross = ", k_cross, " (",
            options.combine, ")");
}

// Checks the options and fills their part of the params; `window` is O, the default of recent.
inline void fill_options(const char* op, const SelectOptions& options, int64_t window, SelectParams& params) {
  CSP_CHECK(options.budget >= 1, op, "budget must be at least 1, got ", options.budget);
  check_int32(op, "budget", options.budget);
  params.budget = options.budget;
  params.recent = options.recent.value_or(window);
  CSP_CHECK(params.recent >= 0 && params.recent <= params.budget, op,
            "recent must be between 0 and budget = ", params.budget, ", got ", params.recent,
            options.recent ? "" : " (by default the size of the observation window)");
  CSP_CHECK(options.cross_ratio >= 0 && options.cross_ratio <= 1, op,
            "cross_ratio must be between 0 and 1, got ", options.cross_ratio);
  params.rho_thousandths = static_cast<int32_t>(std::nearbyint(1000 * options.cross_ratio));
  params.combine = check_combine(op, options.combine);
  params.pool = check_pool(op, options.pool);
  CSP_CHECK(options.pool_kernel >= 1 && options.pool_kernel % 2 == 1, op,
            "pool_kernel must be odd and at least 1, got ", options.pool_kernel);
  params.pool_kernel = options.pool_kernel;
  params.causal = options.causal;
  check_quotas(op, options, params);
  params.k_self = options.k_self.value_or(-1);
  params.k_cross = options.k_cross.value_or(-1);
}

}  // namespace csp
