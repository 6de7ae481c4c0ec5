#include "csp/dual_top_k.h"

#include "backend.h"
#include "checks.h"

namespace csp {
namespace {

// A bool mask that broadcasts to the scores, at their full size and contiguous.
Tensor check_mask(const char* op, const char* name, const Tensor& mask, const Tensor& scores) {
  check_dtype(op, name, mask, ScalarType::Bool);
  check_device(op, name, mask, scores, "self");
  const int64_t missing = scores.dim() - mask.dim();
  bool broadcasts = missing >= 0;
  for (int64_t i = 0; broadcasts && i < mask.dim(); ++i) {
    broadcasts = mask.size(i) == scores.size(missing + i) || mask.size(i) == 1;
  }
  CSP_CHECK(broadcasts, op, name, " must broadcast to the shape of self ", shape_of(scores), ", got ",
            shape_of(mask));
  Tensor full = empty(op, scores, scores.sizes(), ScalarType::Bool);
  torch::stable::copy_(full, mask);
  return full;
}

Tensor dual_top_k(const Tensor& self, const Tensor& cross, int64_t k_self, int64_t k_cross,
                  std::string combine, std::optional<Tensor> valid_self, std::optional<Tensor> valid_cross) {
  constexpr const char* op = "dual_top_k";
  check_defined(op, "self", self);
  check_defined(op, "cross", cross);
  CSP_CHECK(self.dim() >= 1, op, "self must have at least one dimension, got a scalar");
  DualTopKParams params;
  params.dtype = floating_dtype(op, "self", self);
  params.keys = self.size(self.dim() - 1);
  check_int32(op, "N, the last size of self,", params.keys);
  check_dtype(op, "cross", cross, self.scalar_type());
  check_device(op, "cross", cross, self, "self");
  CSP_CHECK(shape_of(cross) == shape_of(self), op, "cross must have the shape of self ", shape_of(self),
            ", got ", shape_of(cross));
  CSP_CHECK(k_self >= 0, op, "k_self must be >= 0, got ", k_self);
  CSP_CHECK(k_cross >= 0, op, "k_cross must be >= 0, got ", k_cross);
  params.k_self = k_self;
  params.k_cross = k_cross;
  params.combine = check_combine(op, combine);
  CSP_CHECK(params.combine != Combine::kCalibrated, op,
            "combine must be \"intersection\" or \"union\", got \"calibrated\"");
  params.rows = params.keys > 0 ? self.numel() / params.keys : 0;

  const Tensor own = contiguous(op, "self", self), other = contiguous(op, "cross", cross);
  if (valid_self) valid_self = check_mask(op, "valid_self", *valid_self, self);
  if (valid_cross) valid_cross = check_mask(op, "valid_cross", *valid_cross, self);
  Tensor mask = empty(op, self, self.sizes(), ScalarType::Bool);
  params.self = own.const_data_ptr();
  params.cross = other.const_data_ptr();
  params.valid_self = valid_self ? static_cast<const bool*>(valid_self->const_data_ptr()) : nullptr;
  params.valid_cross = valid_cross ? static_cast<const bool*>(valid_cross->const_data_ptr()) : nullptr;
  params.mask = static_cast<bool*>(mask.mutable_data_ptr());
  launch(op, {{"self", self}}, params, CSP_LAUNCHER(dual_top_k), CSP_WORKSPACE(dual_top_k));
  return mask;
}

}  // namespace
}  // namespace csp

CSP_IMPL(dual_top_k)
