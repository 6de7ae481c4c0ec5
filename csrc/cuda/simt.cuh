#pragma once

// The primitives that every kernel is written in. Kernels use these and plain C++, never a CUDA keyword or
// intrinsic, so that the same source runs in the test harness, thread by thread, without a GPU.
//
// Blocks are one-dimensional. Warp collectives (sync_warp, shuffle*, ballot, any, all, ldmatrix, mma) are
// always called by all 32 threads of a warp. Memory goes through Global<T> and Shared<T>, which here are
// plain pointers and in the harness check each access.

#ifdef CSP_SIMT_HARNESS
#include "simt/primitives.h"
#else

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

#define CSP_DEVICE __device__ __forceinline__
// A kernel: CSP_KERNEL(threads per block, blocks per multiprocessor) void name(arguments by value).
#define CSP_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
// A static shared array of `count` elements, uninitialised, 16-byte aligned.
#define CSP_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define CSP_UNROLL _Pragma("unroll")
#define CSP_NO_UNROLL _Pragma("unroll 1")

namespace csp::simt {

using Half = __half;
using BFloat16 = __nv_bfloat16;

template <typename T>
using Global = T*;
template <typename T>
using Shared = T*;

// ---- where this thread is ----

CSP_DEVICE int thread() {
  return static_cast<int>(threadIdx.x);
}
CSP_DEVICE int lane() {
  return static_cast<int>(threadIdx.x) & 31;
}
CSP_DEVICE int warp() {
  return static_cast<int>(threadIdx.x) >> 5;
}
CSP_DEVICE int block_threads() {
  return static_cast<int>(blockDim.x);
}
CSP_DEVICE int64_t block_x() {
  return blockIdx.x;
}
CSP_DEVICE int64_t block_y() {
  return blockIdx.y;
}
CSP_DEVICE int64_t block_z() {
  return blockIdx.z;
}
CSP_DEVICE int64_t grid_x() {
  return gridDim.x;
}

// ---- numbers ----

CSP_DEVICE float to_float(float x) {
  return x;
}
CSP_DEVICE float to_float(Half x) {
  return __half2float(x);
}
CSP_DEVICE float to_float(BFloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
CSP_DEVICE T from_float(float x) {
  return static_cast<T>(x);
}

CSP_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CSP_DEVICE float log2_approx(float x) {
  return __log2f(x);
}

CSP_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}
CSP_DEVICE float bits_float(uint32_t x) {
  return __uint_as_float(x);
}
CSP_DEVICE int popcount(uint32_t x) {
  return __popc(x);
}
CSP_DEVICE int leading_zeros(uint32_t x) {
  return __clz(static_cast<int>(x));
}

// Two 16-bit numbers in one register, the first in the low half.
template <typename T>
CSP_DEVICE uint32_t pack2(float low, float high) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, Half>) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

// ---- vectors: N elements in one access of at most 16 bytes, aligned to its size ----

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
  CSP_DEVICE T& operator[](int i) { return data[i]; }
  CSP_DEVICE const T& operator[](int i) const { return data[i]; }
};

template <typename T>
CSP_DEVICE Vec<float, 2> unpack2(uint32_t both) {
  Vec<float, 2> out;
  if constexpr (std::is_same_v<T, Half>) {
    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&both));
    out[0] = f.x, out[1] = f.y;
  } else {
    out[0] = __uint_as_float(both << 16), out[1] = __uint_as_float(both & 0xffff0000u);
  }
  return out;
}

template <int N, typename T>
CSP_DEVICE Vec<std::remove_const_t<T>, N> load_vec(T* from) {
  return *reinterpret_cast<const Vec<std::remove_const_t<T>, N>*>(from);
}

template <int N, typename T>
CSP_DEVICE void store_vec(T* to, const Vec<T, N>& value) {
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

template <int kBytes>
struct Raw;
template <>
struct Raw<16> {
  using type = uint4;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<4> {
  using type = unsigned int;
};
template <>
struct Raw<2> {
  using type = unsigned short;
};
template <>
struct Raw<1> {
  using type = unsigned char;
};

// Global memory that nothing writes while the kernel runs: through the read-only path.
template <int N, typename T>
CSP_DEVICE Vec<T, N> load_readonly(const T* from) {
  using R = typename Raw<sizeof(T) * N>::type;
  const R raw = __ldg(reinterpret_cast<const R*>(from));
  return *reinterpret_cast<const Vec<T, N>*>(&raw);
}

// Global memory that is read once: evicted first.
template <int N, typename T>
CSP_DEVICE Vec<T, N> load_streaming(const T* from) {
  using R = typename Raw<sizeof(T) * N>::type;
  const R raw = __ldcs(reinterpret_cast<const R*>(from));
  return *reinterpret_cast<const Vec<T, N>*>(&raw);
}

template <int N, typename T>
CSP_DEVICE void store_streaming(T* to, const Vec<T, N>& value) {
  using R = typename Raw<sizeof(T) * N>::type;
  __stcs(reinterpret_cast<R*>(to), *reinterpret_cast<const R*>(&value));
}

// ---- memory ----

// A raw pointer out of a params struct.
template <typename T>
CSP_DEVICE T* global(void* pointer) {
  return static_cast<T*>(pointer);
}
template <typename T>
CSP_DEVICE const T* global(const void* pointer) {
  return static_cast<const T*>(pointer);
}

// The same memory as elements of another type.
template <typename U, typename T>
CSP_DEVICE auto as(T* pointer) {
  if constexpr (std::is_const_v<T>) {
    return reinterpret_cast<const U*>(pointer);
  } else {
    return reinterpret_cast<U*>(pointer);
  }
}

// The dynamic shared memory, handed out piece by piece, each 16-byte aligned.
class SharedArena {
 public:
  CSP_DEVICE SharedArena() {
    extern __shared__ __align__(16) unsigned char csp_dynamic_shared[];
    next_ = csp_dynamic_shared;
  }
  template <typename T>
  CSP_DEVICE T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }

 private:
  unsigned char* next_;
};

// ---- the threads of a block, a warp, a cluster ----

CSP_DEVICE void sync_block() {
  __syncthreads();
}
CSP_DEVICE int sync_block_count(bool predicate) {
  return __syncthreads_count(predicate);
}
CSP_DEVICE bool sync_block_any(bool predicate) {
  return __syncthreads_or(predicate);
}
CSP_DEVICE void sync_warp() {
  __syncwarp();
}

template <typename T>
CSP_DEVICE T shuffle(T value, int source_lane) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}
template <typename T>
CSP_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The value of the lane `delta` below; a lane with none below keeps its own.
template <typename T>
CSP_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
template <typename T>
CSP_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}
CSP_DEVICE uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}
CSP_DEVICE bool any(bool predicate) {
  return __any_sync(0xffffffffu, predicate);
}
CSP_DEVICE bool all(bool predicate) {
  return __all_sync(0xffffffffu, predicate);
}

// Which lanes hold the same value as this one.
CSP_DEVICE uint32_t match_any(uint32_t value) {
#if defined(__CUDA_ARCH__)
  return __match_any_sync(0xffffffffu, value);
#else
  return 0;
#endif
}

// Barrier over all blocks of a cluster; what one wrote to global memory before it the others see after it.
CSP_DEVICE void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __trap();
#endif
}

// ---- atomics: integers only, so that results do not depend on the order. They return the old value. ----

template <typename T>
CSP_DEVICE T atomic_add(T* address, T value) {
  return atomicAdd(address, value);
}
template <typename T>
CSP_DEVICE T atomic_max(T* address, T value) {
  return atomicMax(address, value);
}
template <typename T>
CSP_DEVICE T atomic_min(T* address, T value) {
  return atomicMin(address, value);
}
template <typename T>
CSP_DEVICE T atomic_or(T* address, T value) {
  return atomicOr(address, value);
}

// ---- asynchronous copies of 16 bytes from global to shared memory, both 16-byte aligned ----

// Zeros are written, and nothing is read, where `valid` is false. Below sm_80 the copy is synchronous.
template <typename T>
CSP_DEVICE void copy_async(T* to, const T* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = valid ? *reinterpret_cast<const uint4*>(from) : uint4{};
#endif
}

// Closes the group of copies that this thread began since the last call.
CSP_DEVICE void copy_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's groups but the newest kPending; other threads' copies need a barrier after it.
template <int kPending>
CSP_DEVICE void copy_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- tensor cores (sm_80 and later) ----

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8, 16-byte
// aligned. Of matrix m, lane i receives elements (i / 4, 2 (i % 4)) and the next one in out[m].
template <typename T>
CSP_DEVICE void ldmatrix(uint32_t (&out)[4], const T* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}

// The same, each matrix transposed: lane i receives elements (2 (i % 4), i / 4) and the one below.
template <typename T>
CSP_DEVICE void ldmatrix_transposed(uint32_t (&out)[4], const T* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}

// d += a b for a [16, 16], b [16, 8], d [16, 8] in float; T is Half or BFloat16. With g = lane / 4 and
// c = 2 (lane % 4): a[0] = A(g, c..), a[1] = A(g + 8, c..), a[2] = A(g, c + 8..), a[3] = A(g + 8, c + 8..);
// b[0] = B(c.., g), b[1] = B(c + 8.., g); d[0], d[1] = D(g, c..), d[2], d[3] = D(g + 8, c..).
template <typename T>
CSP_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  __trap();
#endif
}

// ---- launching ----

template <typename... Parameters, typename... Arguments>
CudaStatus launch(const CudaContext& context, const LaunchShape& shape, const char* name,
                  void (*kernel)(Parameters...), Arguments&&... arguments) {
  constexpr int64_t kAlwaysAllowed = 48 << 10;
  if (shape.shared_bytes > kAlwaysAllowed) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return (cudaGetLastError(), CudaStatus{error, name});
  }
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y), static_cast<unsigned>(shape.z));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(context.stream);
  cudaLaunchAttribute attribute{};
  if (shape.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  const cudaError_t error =
      std::apply([&](Parameters&... each) { return cudaLaunchKernelEx(&config, kernel, each...); }, values);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // it is reported here, not by whoever asks next
  return {error, name};
}

}  // namespace csp::simt

#endif  // CSP_SIMT_HARNESS

#include "csp/types.h"

namespace csp {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat32> {
  using type = float;
};
template <>
struct ElementOf<DType::kFloat16> {
  using type = simt::Half;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using type = simt::BFloat16;
};
// The element type of a dtype that kernels take.
template <DType kDType>
using Element = typename ElementOf<kDType>::type;

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls launcher(TypeTag<element type>) for the dtypes that kernels take.
template <typename Launcher>
CudaStatus with_element(DType dtype, Launcher launcher) {
  switch (dtype) {
    case DType::kFloat32:
      return launcher(TypeTag<float>());
    case DType::kFloat16:
      return launcher(TypeTag<simt::Half>());
    case DType::kBFloat16:
      return launcher(TypeTag<simt::BFloat16>());
    case DType::kFloat64:
      break;
  }
  return kFloat64Refused;
}

}  // namespace csp

// CSP_LAUNCH(context, shape, (kernel<...>), arguments...) -> CudaStatus.
#define CSP_LAUNCH(context, shape, kernel, ...) \
  ::csp::simt::launch(context, shape, #kernel, kernel, __VA_ARGS__)
