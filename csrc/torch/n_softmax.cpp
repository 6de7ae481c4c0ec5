#include "csp/n_softmax.h"

#include "backend.h"
#include "checks.h"

namespace csp {
namespace {

Tensor n_softmax(const Tensor& logits, double n) {
  constexpr const char* op = "n_softmax";
  CSP_CHECK(logits.dim() >= 1, op, "logits must have at least one dimension, got a scalar");
  check_n(op, n);

  const DType dtype = floating_dtype(op, "logits", logits);
  const Tensor input = contiguous(op, "logits", logits);
  Tensor out = empty(op, input, input.sizes(), input.scalar_type());
  NSoftmaxParams params;
  params.dtype = dtype;
  params.logits = input.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.cols = logits.size(logits.dim() - 1);
  params.rows = params.cols > 0 ? logits.numel() / params.cols : 0;
  params.n = n;
  launch(op, {{"logits", logits}}, params, CSP_LAUNCHER(n_softmax));
  return out;
}

}  // namespace
}  // namespace csp

CSP_IMPL(n_softmax)
