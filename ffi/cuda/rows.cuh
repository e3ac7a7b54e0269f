// A warp's work on one row of 16-byte vectors.
#ifndef JAX_EP_CUDA_ROWS_CUH_
#define JAX_EP_CUDA_ROWS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/layout.h"
#include "cuda/ptx.cuh"

namespace jax_ep::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
// Vectors in flight per lane.
constexpr int kUnroll = 4;

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

__device__ __forceinline__ float Load(float x) { return x; }
__device__ __forceinline__ double Load(double x) { return x; }
__device__ __forceinline__ float Load(__half x) { return __half2float(x); }
__device__ __forceinline__ float Load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void Round(float x, float& out) { out = x; }
__device__ __forceinline__ void Round(double x, double& out) { out = x; }
__device__ __forceinline__ void Round(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void Round(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// sum += weight * v, element by element.
template <typename T>
__device__ __forceinline__ void AddScaled(Sum<T> (&sum)[kPerVector<T>], const int4& v,
                                          Sum<T> weight) {
  const T* elements = reinterpret_cast<const T*>(&v);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) sum[i] += weight * Load(elements[i]);
}

template <typename T>
__device__ __forceinline__ int4 Pack(const Sum<T> (&sum)[kPerVector<T>]) {
  int4 v;
  T* elements = reinterpret_cast<T*>(&v);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) Round(sum[i], elements[i]);
  return v;
}

// 16 bytes of NaNs of `dtype`.
__device__ inline int4 NaNs(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return make_int4(0x7e007e00, 0x7e007e00, 0x7e007e00, 0x7e007e00);
    case DType::kBF16:
      return make_int4(0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0);
    case DType::kF64:
      return make_int4(0, 0x7ff80000, 0, 0x7ff80000);
    case DType::kF32:
      break;
  }
  return make_int4(0x7fc00000, 0x7fc00000, 0x7fc00000, 0x7fc00000);
}

__device__ __forceinline__ void FillRow(int4* row, int vectors, const int4& value) {
  for (int v = threadIdx.x % 32; v < vectors; v += 32) ptx::st_no_allocate(row + v, value);
}

// Calls `launch` with a null T* that names the element type of `dtype`.
template <typename F>
auto VisitDType(DType dtype, F&& launch) {
  switch (dtype) {
    case DType::kF16:
      return launch(static_cast<__half*>(nullptr));
    case DType::kBF16:
      return launch(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kF64:
      return launch(static_cast<double*>(nullptr));
    case DType::kF32:
      break;
  }
  return launch(static_cast<float*>(nullptr));
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_ROWS_CUH_
