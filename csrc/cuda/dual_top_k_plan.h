#pragma once

#include "csp/dual_top_k.h"
#include "launch.h"

namespace csp {

constexpr int32_t kDualTopKThreads = 512;

// One block per row, grid-stride over rows.
LaunchShape dual_top_k_shape(const DualTopKParams& params);

}  // namespace csp
