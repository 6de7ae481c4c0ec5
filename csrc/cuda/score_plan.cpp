#include "score_plan.h"

#include <algorithm>
#include <limits>

namespace csp {
namespace {

constexpr int64_t kMaxSplits = 32;
constexpr int64_t kMaxHeads = 65535;  // of one launch: they are the y of its grid
// Up to here the second pass waits for the keys, not for the tensor cores.
constexpr int32_t kFewRows = 128;

int32_t padded_dim(int64_t head_dim) {
  for (const int32_t dim : {32, 64, 80, 96, 128, 256}) {
    if (head_dim <= dim) return dim;
  }
  return 0;
}

int64_t rows_shared_bytes(int32_t dim) {
  return int64_t{kMmaStages} * mma_key_tile(dim) * dim * 2 + kMmaThreads * 2 * 4 + 2 * mma_key_tile(dim) / 8;
}

int64_t columns_shared_bytes(int32_t dim, int32_t key_warps) {
  const int64_t keys = int64_t{kScoreStationary} * key_warps;
  return (keys + 2 * mma_query_tile(dim)) * dim * 2 + keys + 8 * 4 * kMmaThreads + kMmaConstantRows * 5 +
         kMmaConstantRows / kScoreStep;
}

int64_t cluster_shared_bytes(int32_t dim, int32_t rows) {
  const int64_t warps = kClusterThreads / 32;
  return (rows + cluster_stages(rows) * warps * kScoreStep) * dim * 2 + warps * rows * 8 +
         warps * kScoreStep * cluster_units(rows) + rows * 5 + 32;
}

size_t aligned_bytes(int64_t bytes) {
  return static_cast<size_t>(round_up(bytes, 256));
}

// Waves of blocks times the work of one, in key tiles; one more tile stands for what a block does anyway.
int64_t time_of(int64_t blocks, int64_t slots, int64_t tiles) {
  return ceil_div(blocks, slots) * (tiles + 1);
}

// Cuts the keys of the first pass so that its blocks fill the device.
void split_keys(ScoreCudaPlan& plan, int64_t keys, int32_t key_tile, int64_t slots) {
  const int64_t tiles = ceil_div(keys, key_tile), blocks = plan.heads_per_launch * plan.row_tiles;
  int64_t best = 1, best_time = std::numeric_limits<int64_t>::max();
  for (int64_t splits = 1; splits <= std::min(tiles, kMaxSplits); ++splits) {
    // The second pass reads the sums of eight splits at a time.
    const int64_t time = time_of(blocks * splits, slots, ceil_div(tiles, splits)) + ceil_div(splits, 8);
    if (time >= best_time) continue;
    best_time = time;
    best = splits;
  }
  plan.split_keys = static_cast<int32_t>(ceil_div(tiles, best)) * key_tile;
  plan.splits = static_cast<int32_t>(ceil_div(keys, plan.split_keys));
}

bool plan_cluster(ScoreCudaPlan& plan, const ScoreParams& p, const CudaDevice& device) {
  if (device.capability < 90 || p.lse != nullptr || plan.rows > 64 || plan.dim > 128) return false;
  constexpr int64_t kUnit = kClusterThreads / 32 * kScoreStep;  // keys that a block takes at once
  const int32_t dim = plan.dim <= 64 ? 64 : 128;
  const int32_t rows = plan.rows <= 16 ? 16 : plan.rows <= 32 ? 32 : 64;
  const int64_t units = ceil_div(p.keys, kUnit);
  int64_t cluster = 1;
  while (cluster * cluster_units(rows) < units) cluster *= 2;
  // More blocks than the registers ask for where the device has room for them.
  const int64_t most = std::min<int64_t>(kMaxCluster, units), slots = 2 * device.multiprocessors;
  while (2 * cluster <= most && 2 * cluster * plan.heads_per_launch <= slots) cluster *= 2;
  const int64_t shared_bytes = cluster_shared_bytes(dim, rows);
  if (cluster > kMaxCluster || shared_bytes > device.shared_bytes) {
    return false;
  }
  plan.path = ScorePath::kCluster;
  plan.dim = dim;
  plan.tile_rows = rows;
  plan.splits = static_cast<int32_t>(cluster);
  plan.split_keys = static_cast<int32_t>(ceil_div(units, cluster) * kUnit);
  plan.columns_shared = shared_bytes;
  return true;
}

bool plan_mma(ScoreCudaPlan& plan, const ScoreParams& p, const CudaDevice& device) {
  const int64_t slots = (plan.dim <= 128 ? 2 : 1) * device.multiprocessors;
  if (std::max(rows_shared_bytes(plan.dim), columns_shared_bytes(plan.dim, 2)) > device.shared_bytes) {
    return false;
  }
  plan.path = ScorePath::kMma;
  plan.rows_shared = rows_shared_bytes(plan.dim);
  plan.row_tiles = ceil_div(plan.rows, mma_row_tile(plan.dim));
  plan.tile_rows = static_cast<int32_t>(round_up(ceil_div(plan.rows, plan.row_tiles), kScoreStationary));

  // The second pass finds its keys in the L2 cache where they fit. Of more than fit it goes backwards through
  // what the first pass read last; of far more, and where nothing else takes the time, the heads are taken
  // a cache at a time (half of it: each half of the cache serves one side of the chip).
  const int64_t head_bytes = p.keys * p.head_dim * 2;
  if (p.lse == nullptr && plan.rows <= kFewRows && plan.heads * head_bytes > device.l2_bytes) {
    const int64_t fit = std::max<int64_t>(device.l2_bytes / 2 / head_bytes, 1);
    plan.heads_per_launch = std::min(plan.heads_per_launch, ceil_div(plan.heads, ceil_div(plan.heads, fit)));
  }
  split_keys(plan, p.keys, mma_key_tile(plan.dim), slots);

  // Wide blocks read the queries less often, narrow ones fill the device.
  int64_t best = std::numeric_limits<int64_t>::max();
  for (const int32_t key_warps : {8, 4, 2}) {
    if (columns_shared_bytes(plan.dim, key_warps) > device.shared_bytes) continue;
    if (plan.key_warps > 0 && key_warps == 2 && plan.rows > 2 * kFewRows) continue;
    const int64_t tiles = ceil_div(p.keys, kScoreStationary * key_warps);
    const int64_t time = time_of(plan.heads_per_launch * tiles, slots, key_warps);
    if (time >= best) continue;
    best = time;
    plan.key_warps = key_warps;
    plan.column_tiles = static_cast<int32_t>(tiles);
  }
  plan.columns_shared = columns_shared_bytes(plan.dim, plan.key_warps);
  return true;
}

void plan_fma(ScoreCudaPlan& plan, const ScoreParams& p, const CudaDevice& device) {
  plan.path = ScorePath::kFma;
  plan.tile_rows = kFmaRows;
  plan.row_tiles = ceil_div(plan.rows, kFmaRows);
  plan.column_tiles = static_cast<int32_t>(ceil_div(p.keys, kFmaKeys));
  split_keys(plan, p.keys, kFmaKeys, 3 * device.multiprocessors);
}

}  // namespace

bool score_is_aligned(const ScoreParams& p) {
  return address_of(p.query) % 16 == 0 && address_of(p.key) % 16 == 0;
}

ScoreCudaPlan score_cuda_plan(const ScoreParams& p, const CudaDevice& device, bool aligned) {
  ScoreCudaPlan plan;
  plan.heads = p.batch * p.num_kv_heads;
  if (p.keys > 0 && plan.heads > 0) {
    plan.group = static_cast<int32_t>(p.num_heads / p.num_kv_heads);
    plan.rows = plan.group * p.window;
    plan.heads_per_launch = std::min(plan.heads, kMaxHeads);
    plan.dim = padded_dim(p.head_dim);
    const int64_t elements = 16 / dtype_bytes(p.dtype);
    plan.vectors = aligned && p.head_dim % elements == 0 &&
                   rows_on_vectors(p.query_stride, p.batch, p.num_heads, p.window, elements) &&
                   rows_on_vectors(p.key_stride, p.batch, p.num_kv_heads, p.keys, elements);
    const bool mma = plan.vectors && p.dtype != DType::kFloat32 && device.capability >= 80 && plan.rows > 0 &&
                     p.head_dim > 0 && plan.dim > 0;
    if (!mma || (!plan_cluster(plan, p, device) && !plan_mma(plan, p, device))) plan_fma(plan, p, device);
    const bool two_passes = plan.path != ScorePath::kCluster && p.lse == nullptr && plan.rows > 0;
    plan.launches = ceil_div(plan.heads, plan.heads_per_launch) * (two_passes ? 2 : 1);
    if (p.lse == nullptr) {
      plan.partials_bytes = aligned_bytes(plan.heads_per_launch * plan.rows * plan.splits * 8);
    }
  }
  plan.workspace_bytes = plan.partials_bytes;
  if (p.heads == Heads::kShared && p.num_kv_heads != 1 && p.batch > 0 && p.keys > 0) {
    plan.finish = true;
    plan.launches += 1;
    plan.workspace_bytes += aligned_bytes(plan.heads * 2 * p.keys * 4);
  }
  return plan;
}

size_t score_cuda_workspace_bytes(const ScoreParams& params, const CudaDevice& device) {
  return std::max(score_cuda_plan(params, device, true).workspace_bytes,
                  score_cuda_plan(params, device, false).workspace_bytes);
}

Plan plan_score_cuda(const ScoreParams& p, const CudaDevice& device) {
  Plan plan = cost_of(p);
  plan.workspace_bytes = static_cast<int64_t>(score_cuda_workspace_bytes(p, device));
  plan.launches = score_cuda_plan(p, device, true).launches;
  return plan;
}

}  // namespace csp
