#pragma once

#include "csp/plan.h"
#include "launch.h"

// How score_cuda cuts a problem. Decided in score_plan.cpp from the sizes alone, used by the launcher.
//
// The query heads of a KV head share its keys, so they are rows of one matrix: row r is query r / group of
// head r % group. A row's neighbours are then the same or the next query: they share a modality and, nearly,
// the last key they see.
namespace csp {

enum class ScorePath : int32_t {
  kFma,      // two passes in float32 arithmetic: any dtype, device, layout and head_dim
  kMma,      // two passes on tensor cores
  kCluster,  // few rows: a cluster of blocks reads the keys once and keeps the logits in registers
};

// Rows and columns of the tiles of each path; `dim` is the padded head_dim of the tensor core paths.
constexpr int32_t kScoreStationary = 32;  // rows (first pass) or keys (second) that a warp keeps in registers
constexpr int32_t kScoreStep = 16;        // of the other kind, that it takes at once

constexpr int32_t kMmaThreads = 256;
constexpr int32_t kMmaStages = 3;           // key tiles on their way in the first pass
constexpr int32_t kMmaConstantRows = 1024;  // row constants held at once in the second pass
constexpr int32_t mma_key_tile(int32_t dim) {
  return dim <= 128 ? 128 : 64;
}
// The largest row tile of the first pass: it fits into two of the three key stages.
constexpr int32_t mma_row_tile(int32_t dim) {
  return 2 * mma_key_tile(dim);
}
constexpr int32_t mma_query_tile(int32_t dim) {
  return dim <= 128 ? 64 : 32;
}

constexpr int32_t kFmaThreads = 128;
constexpr int32_t kFmaRows = 32;
constexpr int32_t kFmaKeys = 128;

constexpr int32_t kClusterThreads = 256;
constexpr int32_t kMaxCluster = 8;
// Units of 16 keys that a warp keeps of `rows` rows: 64 logits a thread.
constexpr int32_t cluster_units(int32_t rows) {
  return 128 / rows;
}
constexpr int32_t cluster_stages(int32_t rows) {
  return cluster_units(rows) < 3 ? cluster_units(rows) : 3;
}

struct ScoreCudaPlan {
  ScorePath path = ScorePath::kFma;
  int32_t dim = 0;       // head_dim rounded up to one that the tensor core kernels have
  int32_t group = 0;     // query heads of a KV head
  int64_t rows = 0;      // group * window
  bool vectors = false;  // rows of query and key are whole 16-byte vectors
  int64_t heads = 0;     // batch * num_kv_heads
  int64_t heads_per_launch = 0;
  // First pass, or the only one: a block takes tile_rows rows of a head and split_keys of its keys.
  int32_t tile_rows = 0;
  int64_t row_tiles = 0;
  int32_t split_keys = 0;
  int32_t splits = 0;  // kCluster: the blocks of a cluster
  // Second pass: a block takes one of column_tiles tiles of keys.
  int32_t key_warps = 0;  // kMma: warps side by side along the keys
  int32_t column_tiles = 0;
  int64_t rows_shared = 0;     // dynamic shared bytes of the first pass
  int64_t columns_shared = 0;  // of the second or the only one
  size_t partials_bytes = 0;   // the row sums of one launch, at the front of the workspace
  size_t workspace_bytes = 0;  // behind them, if `finish`, the column sums [B, Hkv, 2, L]
  bool finish = false;         // the column sums of the KV heads are added up at the end
  int64_t launches = 0;
};

// Whether query and key lie on 16-byte boundaries.
bool score_is_aligned(const ScoreParams& params);

// No pointer is looked at but lse, so `aligned` says what score_is_aligned would.
ScoreCudaPlan score_cuda_plan(const ScoreParams& params, const CudaDevice& device, bool aligned);

// The kernels of one dtype, all but the finish; one translation unit each.
template <DType kDType>
CudaStatus launch_score(const ScoreParams& params, const ScoreCudaPlan& plan, const CudaContext& context);

}  // namespace csp
