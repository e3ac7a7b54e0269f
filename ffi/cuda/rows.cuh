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

__device__ inline int NumVectors(const MoEShape& shape) {
  return static_cast<int>(shape.row_bytes() / 16);
}

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

// The elements of 16 bytes as numbers to add up, and back; two at a time where they share a word.
template <typename T>
struct Vector {
  using Elements = Sum<T>[kPerVector<T>];

  static __device__ __forceinline__ void Unpack(const int4& v, Elements& out) {
    const T* elements = reinterpret_cast<const T*>(&v);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) out[i] = elements[i];
  }
  static __device__ __forceinline__ int4 Pack(const Elements& in) {
    int4 v;
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) reinterpret_cast<T*>(&v)[i] = in[i];
    return v;
  }
};

template <>
struct Vector<__nv_bfloat16> {
  using Elements = float[8];

  static __device__ __forceinline__ void Unpack(const int4& v, Elements& out) {
    const uint32_t words[] = {static_cast<uint32_t>(v.x), static_cast<uint32_t>(v.y),
                              static_cast<uint32_t>(v.z), static_cast<uint32_t>(v.w)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ int4 Pack(const Elements& in) {
    int4 v;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      reinterpret_cast<__nv_bfloat162*>(&v)[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    return v;
  }
};

template <>
struct Vector<__half> {
  using Elements = float[8];

  static __device__ __forceinline__ void Unpack(const int4& v, Elements& out) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2*>(&v)[i]);
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ int4 Pack(const Elements& in) {
    int4 v;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      reinterpret_cast<__half2*>(&v)[i] = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
    return v;
  }
};

template <typename T>
__device__ __forceinline__ float ToFloat(const T& x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __uint_as_float(uint32_t{*reinterpret_cast<const uint16_t*>(&x)} << 16);
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(x);
  else
    return static_cast<float>(x);
}

// sum += weight * v, element by element.
template <typename T>
__device__ __forceinline__ void AddScaled(Sum<T> (&sum)[kPerVector<T>], const int4& v,
                                          Sum<T> weight) {
  Sum<T> x[kPerVector<T>];
  Vector<T>::Unpack(v, x);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) sum[i] += weight * x[i];
}

template <typename T>
__device__ __forceinline__ int4 Pack(const Sum<T> (&sum)[kPerVector<T>]) {
  return Vector<T>::Pack(sum);
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
