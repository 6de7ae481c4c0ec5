#include "csp/score.h"

#include <cstring>
#include <type_traits>

#include "score_kernel.h"

namespace csp {
namespace {

// Enough tasks to feed every core of a large machine when there are few KV heads (GQA, batch 1).
constexpr int64_t kFewestTasks = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

ScorePlan plan_of(const ScoreParams& p) {
  ScorePlan plan;
  const int64_t heads = p.batch * p.num_kv_heads;
  plan.group = p.num_heads / p.num_kv_heads;
  const int64_t tiles = ceil_div(plan.group * p.window, kScoreRows);
  const int64_t wanted = ceil_div(kFewestTasks, heads);
  const int64_t chunk_tiles = tiles > wanted ? ceil_div(tiles, wanted) : 1;
  plan.chunk_rows = chunk_tiles * kScoreRows;
  plan.chunks = tiles > 0 ? ceil_div(tiles, chunk_tiles) : 1;
  plan.tasks = heads * plan.chunks;
  plan.partials = p.heads == Heads::kShared ? p.num_kv_heads * plan.chunks : plan.chunks;
  plan.padded_keys = ceil_div(p.keys, kScoreBlock) * kScoreBlock;
  plan.mean = 1.0 / static_cast<double>(p.heads == Heads::kShared ? p.num_heads : plan.group);
  plan.bf16_dot = p.dtype == DType::kBFloat16 && p.head_dim > 0 && p.head_dim % 2 == 0 && cpu_has_bf16_dot();
  return plan;
}

bool is_empty(const ScoreParams& p) {
  return p.batch == 0 || p.num_heads == 0 || p.keys == 0;
}

// Cuts one worker's scratch at `base` into its pieces and returns its size; only that where base is null.
size_t cut(const ScoreParams& p, const ScorePlan& plan, char* base, ScoreScratch& scratch) {
  // A float64 row is scored alone: it needs the lists and one row of logits.
  const bool wide = p.dtype == DType::kFloat64;
  const size_t blocks = plan.padded_keys / kScoreBlock;
  const size_t tile_blocks = p.lse == nullptr ? blocks : 1;
  const size_t dims = wide ? 0 : p.head_dim;
  const size_t stats = wide || p.lse != nullptr ? 0 : blocks * kScoreRows;
  size_t used = 0;
  const auto take = [&](auto& piece, size_t bytes) {
    if (base != nullptr) piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(base + used);
    used += cache_lines(bytes);
  };
  take(scratch.order, p.window * sizeof(int32_t));
  take(scratch.modality, plan.padded_keys);
  take(scratch.real, blocks);
  take(scratch.query, dims * kScoreRows * sizeof(float));
  take(scratch.keys, dims * 12 * sizeof(float));
  take(scratch.tops, stats * sizeof(float));
  take(scratch.sums, stats * sizeof(float));
  take(scratch.tile, wide ? p.keys * sizeof(double) : tile_blocks * kScoreBlock * kScoreRows * sizeof(float));
  return used;
}

size_t scratch_bytes(const ScoreParams& p, const ScorePlan& plan) {
  ScoreScratch unused;
  return cut(p, plan, nullptr, unused);
}

// Bytes of one task's partial sums, [2, L].
size_t partial_bytes(const ScoreParams& p) {
  return 2 * p.keys * dtype_bytes(accumulate_dtype(p.dtype));
}

int64_t workers_of(const ScorePlan& plan, int32_t num_threads) {
  const int64_t threads = num_threads < 1 ? 1 : num_threads;
  return plan.tasks < threads ? plan.tasks : threads;
}

}  // namespace

size_t score_cpu_workspace_bytes(const ScoreParams& params, int32_t num_threads) {
  if (is_empty(params)) return 0;
  const ScorePlan plan = plan_of(params);
  const size_t partials = plan.partials > 1 ? plan.tasks * partial_bytes(params) : 0;
  return workers_of(plan, num_threads) * scratch_bytes(params, plan) + cache_lines(partials);
}

int64_t score_cpu_tasks(const ScoreParams& params) {
  return is_empty(params) ? 0 : plan_of(params).tasks;
}

void score_cpu(const ScoreParams& params, void* workspace, const Parallel& parallel) {
  const int64_t row_bytes = params.keys * dtype_bytes(accumulate_dtype(params.dtype));
  if (is_empty(params)) {
    // "shared" has an output row even where there are no heads.
    const int64_t rows = params.heads == Heads::kShared ? params.batch : 0;
    if (rows * row_bytes == 0) return;
    std::memset(params.self, 0, rows * row_bytes);
    std::memset(params.cross, 0, rows * row_bytes);
    return;
  }
  const ScorePlan plan = plan_of(params);
  char* const scratches = static_cast<char*>(workspace);
  const size_t scratch_size = scratch_bytes(params, plan);
  char* const partials = scratches + workers_of(plan, parallel.num_threads) * scratch_size;
  for_each_task(parallel, plan.tasks, [&](int64_t task, int32_t worker) {
    ScoreScratch scratch;
    cut(params, plan, scratches + worker * scratch_size, scratch);
    char* self = static_cast<char*>(params.self) + task * row_bytes;
    char* cross = static_cast<char*>(params.cross) + task * row_bytes;
    if (plan.partials > 1) {
      self = partials + task * 2 * row_bytes;
      cross = self + row_bytes;
    }
    CSP_CALL_KERNEL(score_chunk, params, plan, task, scratch, self, cross);
  });
  if (plan.partials == 1) return;

  constexpr int64_t kSpan = 4096;
  const int64_t spans = ceil_div(params.keys, kSpan);
  for_each_task(parallel, plan.tasks / plan.partials * spans, [&](int64_t task, int32_t) {
    const int64_t row = task / spans;
    const int64_t begin = task % spans * kSpan;
    const int64_t end = begin + kSpan < params.keys ? begin + kSpan : params.keys;
    CSP_CALL_KERNEL(score_reduce, params, plan, row, partials + row * plan.partials * 2 * row_bytes, begin,
                    end);
  });
}

}  // namespace csp
