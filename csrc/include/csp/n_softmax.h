#pragma once

#include "csp/cuda.h"
#include "csp/parallel.h"
#include "csp/types.h"

namespace csp {

// n-softmax over the last dimension (CSP Eq. 7): out = exp(x) / (n + sum exp(x)).
// A row whose logits are all -inf gives zeros.
struct NSoftmaxParams {
  DType dtype = DType::kFloat32;  // of logits and out
  const void* logits = nullptr;   // [rows, cols], contiguous
  void* out = nullptr;            // [rows, cols], contiguous
  int64_t rows = 0;
  int64_t cols = 0;
  double n = 1.0;  // >= 0
};

void n_softmax_cpu(const NSoftmaxParams& params, const Parallel& parallel = {});

// Needs no workspace; float64 is refused.
CudaStatus n_softmax_cuda(const NSoftmaxParams& params, const CudaContext& context);

}  // namespace csp
