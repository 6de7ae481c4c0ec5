#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace csp {

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ inline T from_float(float x) {
  return static_cast<T>(x);
}

}  // namespace csp
