#pragma once

#include "decode_fma.cuh"
#include "decode_mma.cuh"

namespace csp {

// Whether query, key and value can be read in vectors of `elements`.
inline bool decode_aligned(const DecodeParams& p, int64_t elements) {
  const auto bytes = static_cast<uint64_t>(elements * dtype_bytes(p.dtype));
  return p.head_dim % elements == 0 &&
         (address_of(p.query) | address_of(p.key) | address_of(p.value)) % bytes == 0 &&
         rows_on_vectors(p.query_stride, p.batch, p.num_heads, p.queries, elements) &&
         rows_on_vectors(p.key_stride, p.batch, p.num_kv_heads, p.capacity, elements) &&
         rows_on_vectors(p.value_stride, p.batch, p.num_kv_heads, p.capacity, elements);
}

struct DecodeLaunch {
  simt::DecodeArguments arguments;
  LaunchShape shape;
  const CudaContext& context;

  void cut_rows(int64_t tile) {
    const DecodeParams& p = arguments.problem;
    arguments.row_tiles = static_cast<int>(ceil_div(arguments.rows, tile));
    shape.x = p.batch * p.num_kv_heads * arguments.row_tiles * arguments.splits;
  }
};

template <typename T, int kDim>
CudaStatus launch_decode_mma(DecodeLaunch& launch) {
  launch.cut_rows(kDecodeMmaRows);
  launch.shape.shared_bytes = simt::DecodeMma<T, kDim>::kSharedBytes;
  return CSP_LAUNCH(launch.context, launch.shape, (simt::decode_mma_kernel<T, kDim>), launch.arguments);
}

template <typename T>
CudaStatus launch_decode_mma(DecodeLaunch& launch) {
  const int64_t head_dim = launch.arguments.problem.head_dim;
  if (head_dim <= 32) return launch_decode_mma<T, 32>(launch);
  if (head_dim <= 64) return launch_decode_mma<T, 64>(launch);
  if (head_dim <= 80) return launch_decode_mma<T, 80>(launch);
  if (head_dim <= 96) return launch_decode_mma<T, 96>(launch);
  if (head_dim <= 128) return launch_decode_mma<T, 128>(launch);
  return launch_decode_mma<T, 256>(launch);
}

template <typename T, int kVec, int kColumns>
CudaStatus launch_decode_fma(DecodeLaunch& launch) {
  constexpr int kRows = decode_fma_rows(kColumns);
  launch.cut_rows(kRows);
  return CSP_LAUNCH(launch.context, launch.shape, (simt::decode_fma_kernel<T, kVec, kColumns, kRows>),
                    launch.arguments);
}

template <typename T, int kVec>
CudaStatus launch_decode_fma(DecodeLaunch& launch) {
  switch (decode_fma_columns(launch.arguments.problem.head_dim)) {
    case 4:
      return launch_decode_fma<T, kVec, 4>(launch);
    case 8:
      return launch_decode_fma<T, kVec, 8>(launch);
    default:
      return launch_decode_fma<T, kVec, 16>(launch);
  }
}

template <DType kDType>
CudaStatus launch_decode(const DecodeParams& params, const DecodeCudaPlan& plan, const CudaContext& context) {
  using T = Element<kDType>;
  const int64_t rows = params.batch * params.num_kv_heads * plan.rows;
  DecodeLaunch launch{{}, {}, context};
  simt::DecodeArguments& arguments = launch.arguments;
  arguments.problem = params;
  arguments.rows = static_cast<int>(plan.rows);
  arguments.splits = static_cast<int>(plan.splits);
  arguments.clustered = plan.clustered;
  arguments.scale_log2 = static_cast<float>(params.scale * 1.4426950408889634);
  arguments.log2_n = static_cast<float>(params.n > 0 ? std::log2(params.n) : -INFINITY);
  arguments.tops = static_cast<float*>(context.workspace);
  arguments.sums = arguments.tops + rows * plan.splits;
  arguments.outs = arguments.sums + rows * plan.splits;
  launch.shape.threads = simt::kDecodeThreads;
  launch.shape.cluster = plan.clustered ? static_cast<int32_t>(plan.splits) : 1;

  CudaStatus status;
  bool on_tensor_cores = false;
  if constexpr (sizeof(T) == 2) {
    on_tensor_cores = plan.tensor_cores && decode_aligned(params, 8);
    if (on_tensor_cores) status = launch_decode_mma<T>(launch);
  }
  if (!on_tensor_cores) {
    status = decode_aligned(params, 4) ? launch_decode_fma<T, 4>(launch) : launch_decode_fma<T, 1>(launch);
  }
  if (!status.ok() || plan.launches == 1) return status;

  LaunchShape shape;
  const int64_t items = rows * ceil_div(params.head_dim, 32);
  shape.x = ceil_div(items, simt::kDecodeWarps);
  shape.threads = simt::kDecodeThreads;
  return CSP_LAUNCH(context, shape, (simt::decode_combine_kernel<T>), arguments, items);
}

}  // namespace csp
