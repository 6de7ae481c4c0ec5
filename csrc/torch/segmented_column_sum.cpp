#include "csp/segmented_column_sum.h"

#include <tuple>

#include "backend.h"
#include "checks.h"

namespace csp {
namespace {

std::tuple<Tensor, Tensor> segmented_column_sum(const Tensor& attn, const Tensor& query_modality,
                                                const Tensor& key_modality) {
  constexpr const char* op = "segmented_column_sum";
  check_rank(op, "attn", attn, 4, "[B, H, O, N]");
  const DType dtype = floating_dtype(op, "attn", attn);
  check_unit_stride(op, "attn", attn);
  const Tensor queries = check_modality(op, "query_modality", query_modality, attn, "attn", attn.size(0),
                                        attn.size(2), "[B, O]");
  const Tensor keys =
      check_modality(op, "key_modality", key_modality, attn, "attn", attn.size(0), attn.size(3), "[B, N]");

  const ScalarType sums = scalar_type_of(accumulate_dtype(dtype));
  Tensor self = empty(op, attn, {attn.size(0), attn.size(1), attn.size(3)}, sums);
  Tensor cross = empty(op, attn, {attn.size(0), attn.size(1), attn.size(3)}, sums);
  SegmentedColumnSumParams params;
  params.dtype = dtype;
  params.attn = attn.const_data_ptr();
  params.attn_stride = strides_of(attn);
  params.query_modality = static_cast<const int8_t*>(queries.const_data_ptr());
  params.key_modality = static_cast<const int8_t*>(keys.const_data_ptr());
  params.self = self.mutable_data_ptr();
  params.cross = cross.mutable_data_ptr();
  params.batch = attn.size(0);
  params.num_heads = attn.size(1);
  params.window = attn.size(2);
  params.keys = attn.size(3);
#ifdef CSP_CUDA
  launch(op, {{"attn", attn}}, params, segmented_column_sum_cuda, segmented_column_sum_cuda_workspace_bytes);
#else
  launch(op, {{"attn", attn}}, params, segmented_column_sum_cpu);
#endif
  return {self, cross};
}

}  // namespace
}  // namespace csp

CSP_IMPL(segmented_column_sum)
