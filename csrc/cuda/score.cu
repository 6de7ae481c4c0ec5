#include "score_plan.h"
#include "simt.cuh"

namespace csp {
namespace {

using namespace simt;

constexpr int kFinishThreads = 256;

// Outputs [batch, keys] as the sum of the column sums [batch, parts, 2, keys], first to last.
CSP_KERNEL(kFinishThreads, 4)
void score_finish(const void* columns, void* self, void* cross, int64_t batch, int64_t parts, int64_t keys) {
  const int64_t step = grid_x() * kFinishThreads;
  for (int64_t i = block_x() * kFinishThreads + thread(); i < 2 * batch * keys; i += step) {
    const int64_t row = i / keys, key = i - row * keys;  // row: batch and self or cross
    const Global<const float> from = global<float>(columns) + (row / 2 * parts * 2 + row % 2) * keys + key;
    float sum = 0;
    constexpr int kAtOnce = 8;  // loads on their way
    for (int64_t part = 0; part < parts; part += kAtOnce) {
      float x[kAtOnce];
      CSP_UNROLL
      for (int k = 0; k < kAtOnce; ++k) x[k] = part + k < parts ? float(from[(part + k) * 2 * keys]) : 0.0f;
      CSP_UNROLL
      for (int k = 0; k < kAtOnce; ++k) sum += x[k];
    }
    global<float>(row % 2 == 0 ? self : cross)[row / 2 * keys + key] = sum;
  }
}

CudaStatus launch_finish(const ScoreParams& p, const ScoreCudaPlan& plan, const CudaContext& context) {
  LaunchShape shape;
  shape.threads = kFinishThreads;
  const int64_t blocks = ceil_div(2 * p.batch * p.keys, kFinishThreads), most = 1 << 20;
  shape.x = blocks < most ? blocks : most;
  const void* const columns = static_cast<const char*>(context.workspace) + plan.partials_bytes;
  return CSP_LAUNCH(context, shape, score_finish, columns, p.self, p.cross, p.batch, p.num_kv_heads, p.keys);
}

}  // namespace

CudaStatus score_cuda(const ScoreParams& params, const CudaContext& context) {
  if (params.dtype == DType::kFloat64) return kFloat64Refused;
  constexpr int64_t kMost = 1 << 30;
  if (params.keys > kMost || params.num_heads * params.window > kMost ||
      params.batch * params.num_kv_heads > kMost) {
    return {kCudaNotSupported, nullptr,
            "more than 2^30 keys, queries of a batch row, or batch rows and heads"};
  }
  const CudaStatus enough = check_workspace(context, score_cuda_workspace_bytes(params, context.device));
  if (!enough.ok()) return enough;
  const ScoreCudaPlan plan = score_cuda_plan(params, context.device, score_is_aligned(params));
  if (plan.heads_per_launch > 0) {
    const auto launch = params.dtype == DType::kFloat32   ? launch_score<DType::kFloat32>
                        : params.dtype == DType::kFloat16 ? launch_score<DType::kFloat16>
                                                          : launch_score<DType::kBFloat16>;
    const CudaStatus status = launch(params, plan, context);
    if (!status.ok()) return status;
  }
  return plan.finish ? launch_finish(params, plan, context) : CudaStatus{};
}

}  // namespace csp
