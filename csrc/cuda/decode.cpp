#include "csp/decode.h"

#include "decode_plan.h"

namespace csp {

CudaStatus decode_cuda(const DecodeParams& params, const CudaContext& context) {
  const DecodeCudaPlan plan = decode_cuda_plan(params, context.device);
  if (plan.launches == 0) return {};
  const CudaStatus enough = check_workspace(context, static_cast<size_t>(plan.workspace_bytes));
  if (!enough.ok()) return enough;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_decode<DType::kFloat32>(params, plan, context);
    case DType::kFloat16:
      return launch_decode<DType::kFloat16>(params, plan, context);
    case DType::kBFloat16:
      return launch_decode<DType::kBFloat16>(params, plan, context);
    case DType::kFloat64:
      break;
  }
  return kFloat64Refused;
}

}  // namespace csp
