#pragma once

#include "simt.cuh"

// Reductions in a fixed order, so that float results are bitwise equal from run to run.
namespace csp::simt {

struct Add {
  template <typename T>
  CSP_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  CSP_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over the lanes of a warp; every lane gets the result.
template <typename T, typename Op>
CSP_DEVICE T reduce_warp(T value, Op op) {
  CSP_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value = op(value, shuffle_xor(value, mask));
  return value;
}

// Over a block of kWarps warps; every thread gets the result. `scratch` holds kWarps values; it may be used
// again at once.
template <int kWarps, typename T, typename Op>
CSP_DEVICE T reduce_block(T value, Shared<T> scratch, Op op) {
  value = reduce_warp(value, op);
  sync_block();
  if (lane() == 0) scratch[warp()] = value;
  sync_block();
  value = scratch[0];
  CSP_UNROLL
  for (int w = 1; w < kWarps; ++w) value = op(value, static_cast<T>(scratch[w]));
  return value;
}

}  // namespace csp::simt
