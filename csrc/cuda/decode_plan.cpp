#include "decode_plan.h"

#include <algorithm>

#include "csp/plan.h"

namespace csp {
namespace {

// Two blocks on each multiprocessor keep more than 64 KiB in flight there, twice what the memory's latency
// asks for. More rows than that need no splits: where memory is the bound all blocks advance alike, and the
// last ones, alone, run several times as fast.
constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kMinSlots = 64;  // of a split: 16 for each warp
constexpr int64_t kMaxSplits = 128;
constexpr int64_t kMaxCluster = 8;
// Up to here eight splits of few rows end before more splits and a second launch would.
constexpr int64_t kClusterSlots = 4096;

int64_t splits_of(const DecodeParams& p, int64_t row_tiles, const CudaDevice& device) {
  const int64_t blocks = p.batch * p.num_kv_heads * row_tiles;
  const int64_t wanted = kBlocksPerMultiprocessor * device.multiprocessors / blocks;
  const int64_t splits = std::clamp<int64_t>(std::min(wanted, p.capacity / kMinSlots), 1, kMaxSplits);
  const bool merge_at_once = device.capability >= 90 && p.capacity <= kClusterSlots;
  return merge_at_once ? std::min(splits, kMaxCluster) : splits;
}

}  // namespace

DecodeCudaPlan decode_cuda_plan(const DecodeParams& p, const CudaDevice& device) {
  DecodeCudaPlan plan;
  if (p.batch == 0 || p.num_heads == 0 || p.num_kv_heads == 0 || p.queries == 0 || p.head_dim == 0) {
    return plan;
  }
  plan.rows = p.num_heads / p.num_kv_heads * p.queries;
  plan.tensor_cores = device.capability >= 80 && dtype_bytes(p.dtype) == 2 && p.head_dim % 8 == 0 &&
                      p.head_dim <= kDecodeMmaHeadDim;
  const int64_t tile = plan.tensor_cores ? kDecodeMmaRows : decode_fma_rows(decode_fma_columns(p.head_dim));
  plan.splits = splits_of(p, ceil_div(plan.rows, tile), device);
  plan.clustered = device.capability >= 90 && plan.splits > 1 && plan.splits <= kMaxCluster;
  if (plan.splits > 1) {
    plan.workspace_bytes = p.batch * p.num_kv_heads * plan.rows * plan.splits * (p.head_dim + 2) *
                           static_cast<int64_t>(sizeof(float));
  }
  plan.launches = plan.splits > 1 && !plan.clustered ? 2 : 1;
  return plan;
}

size_t decode_cuda_workspace_bytes(const DecodeParams& params, const CudaDevice& device) {
  return static_cast<size_t>(decode_cuda_plan(params, device).workspace_bytes);
}

Plan plan_decode_cuda(const DecodeParams& p, const CudaDevice& device) {
  const DecodeCudaPlan cut = decode_cuda_plan(p, device);
  Plan plan = cost_of(p);
  plan.workspace_bytes = cut.workspace_bytes;
  plan.launches = cut.launches;
  return plan;
}

}  // namespace csp
