#pragma once

#include <cmath>
#include <initializer_list>

#include "score_cluster.cuh"
#include "score_fma.cuh"
#include "score_mma.cuh"

// launch_score of one dtype, for score_<dtype>.cu.
namespace csp {

inline score_kernels::ScoreArgs score_args(const ScoreParams& p, const ScoreCudaPlan& plan, void* workspace) {
  constexpr double kLog2E = 1.4426950408889634;
  score_kernels::ScoreArgs a{};
  a.query = p.query;
  a.key = p.key;
  a.modality = p.modality;
  a.query_modality = p.query_modality;
  a.lse = p.lse;
  a.partials = workspace;
  a.self = p.self;
  a.cross = p.cross;
  a.out_stride = p.keys;
  if (plan.finish) {
    a.self = static_cast<char*>(workspace) + plan.partials_bytes;
    a.cross = static_cast<float*>(a.self) + p.keys;
    a.out_stride = 2 * p.keys;
  }
  a.query_stride = p.query_stride;
  a.key_stride = p.key_stride;
  a.num_kv_heads = static_cast<int32_t>(p.num_kv_heads);
  a.group = plan.group;
  a.rows = static_cast<int32_t>(plan.rows);
  a.window = static_cast<int32_t>(p.window);
  a.keys = static_cast<int32_t>(p.keys);
  a.head_dim = static_cast<int32_t>(p.head_dim);
  a.tile_rows = plan.tile_rows;
  a.split_keys = plan.split_keys;
  a.splits = plan.splits;
  a.key_warps = plan.key_warps;
  a.scale = static_cast<float>(p.scale * kLog2E);
  a.log2_n = static_cast<float>(p.n > 0 ? std::log2(p.n) : -INFINITY);
  const int64_t averaged = p.heads == Heads::kShared ? p.num_heads : plan.group;
  a.mean = averaged > 0 ? static_cast<float>(1.0 / static_cast<double>(averaged)) : 0.0f;
  a.causal = p.causal;
  a.vectors = plan.vectors;
  return a;
}

struct ScorePass {
  const char* name;
  void (*kernel)(score_kernels::ScoreArgs);
  LaunchShape shape;  // of one head
};

// The passes over heads_per_launch heads at a time; a pass without blocks is left out.
inline CudaStatus launch_passes(const ScoreCudaPlan& plan, const CudaContext& context,
                                score_kernels::ScoreArgs args, std::initializer_list<ScorePass> passes) {
  for (int64_t first = 0; first < plan.heads; first += plan.heads_per_launch) {
    const int64_t left = plan.heads - first;
    args.first_head = static_cast<int32_t>(first);
    args.num_heads = static_cast<int32_t>(left < plan.heads_per_launch ? left : plan.heads_per_launch);
    for (const ScorePass& pass : passes) {
      if (pass.shape.x == 0) continue;
      LaunchShape shape = pass.shape;
      shape.y = args.num_heads;
      const CudaStatus status = simt::launch(context, shape, pass.name, pass.kernel, args);
      if (!status.ok()) return status;
    }
  }
  return {};
}

inline LaunchShape rows_shape(const ScoreCudaPlan& plan, const score_kernels::ScoreArgs& args,
                              int32_t threads) {
  const int64_t blocks = args.lse == nullptr ? plan.row_tiles * plan.splits : 0;
  return {blocks, 1, 1, threads, plan.rows_shared};
}
inline LaunchShape columns_shape(const ScoreCudaPlan& plan, int32_t threads) {
  return {plan.column_tiles, 1, 1, threads, plan.columns_shared};
}

template <typename T, int kDim>
CudaStatus launch_score_mma(const ScoreCudaPlan& plan, const CudaContext& context,
                            const score_kernels::ScoreArgs& args) {
  return launch_passes(
      plan, context, args,
      {{"score_rows_mma", score_kernels::score_rows_mma<T, kDim>, rows_shape(plan, args, kMmaThreads)},
       {"score_columns_mma", score_kernels::score_columns_mma<T, kDim>, columns_shape(plan, kMmaThreads)}});
}

template <typename T, int kDim, int kRows>
CudaStatus launch_score_cluster(const ScoreCudaPlan& plan, const CudaContext& context,
                                const score_kernels::ScoreArgs& args) {
  const LaunchShape shape{plan.splits, 1, 1, kClusterThreads, plan.columns_shared, plan.splits};
  return launch_passes(plan, context, args,
                       {{"score_cluster", score_kernels::score_cluster<T, kDim, kRows>, shape}});
}

template <DType kDType>
CudaStatus launch_score(const ScoreParams& params, const ScoreCudaPlan& plan, const CudaContext& context) {
  using T = Element<kDType>;
  const score_kernels::ScoreArgs args = score_args(params, plan, context.workspace);
  if constexpr (sizeof(T) == 2) {
    if (plan.path == ScorePath::kCluster) {
      switch (plan.dim + plan.tile_rows) {
        case 64 + 16:
          return launch_score_cluster<T, 64, 16>(plan, context, args);
        case 64 + 32:
          return launch_score_cluster<T, 64, 32>(plan, context, args);
        case 64 + 64:
          return launch_score_cluster<T, 64, 64>(plan, context, args);
        case 128 + 16:
          return launch_score_cluster<T, 128, 16>(plan, context, args);
        case 128 + 32:
          return launch_score_cluster<T, 128, 32>(plan, context, args);
        default:
          return launch_score_cluster<T, 128, 64>(plan, context, args);
      }
    }
    if (plan.path == ScorePath::kMma) {
      switch (plan.dim) {
        case 32:
          return launch_score_mma<T, 32>(plan, context, args);
        case 64:
          return launch_score_mma<T, 64>(plan, context, args);
        case 80:
          return launch_score_mma<T, 80>(plan, context, args);
        case 96:
          return launch_score_mma<T, 96>(plan, context, args);
        case 128:
          return launch_score_mma<T, 128>(plan, context, args);
        default:
          return launch_score_mma<T, 256>(plan, context, args);
      }
    }
  }
  return launch_passes(
      plan, context, args,
      {{"score_rows_fma", score_kernels::score_rows_fma<T>, rows_shape(plan, args, kFmaThreads)},
       {"score_columns_fma", score_kernels::score_columns_fma<T>, columns_shape(plan, kFmaThreads)}});
}

}  // namespace csp
