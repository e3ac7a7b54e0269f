// Quantised rows, as jax_ep/_quant.py defines them bit for bit.
#ifndef JAX_EP_CUDA_QUANT_CUH_
#define JAX_EP_CUDA_QUANT_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/ops.h"
#include "cuda/ptx.cuh"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {

// Where a quantised row goes: its elements, and their scales.
struct QuantRow {
  std::byte* elements;
  std::byte* scales;
};

// A row in a window: the scales follow the elements.
__device__ __forceinline__ QuantRow InWindow(const MoEShape& shape, int4* row) {
  auto* elements = reinterpret_cast<std::byte*>(row);
  return {elements, elements + shape.hidden_size};
}
__device__ __forceinline__ QuantRow InOutput(const MoEShape& shape, const DispatchParams& p,
                                             int64_t row) {
  return {static_cast<std::byte*>(p.tokens) + row * shape.hidden_size,
          static_cast<std::byte*>(p.quant.row_scales) + row * p.scale_row_bytes(shape)};
}

// Copies what is no multiple of 16 bytes, by the threads `thread` of `threads`.
__device__ __forceinline__ void CopyScales(std::byte* to, const std::byte* from, int64_t bytes,
                                           int thread, int threads) {
  if (bytes % 4 == 0) {
    for (int64_t i = thread; i < bytes / 4; i += threads)
      reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
  } else {
    for (int64_t i = thread; i < bytes; i += threads) to[i] = from[i];
  }
}

// The scale of a block as it is stored, and what its elements are multiplied by.
struct BlockScale {
  uint32_t bits;
  float inverse;

  // `amax` are the bits of the largest magnitude, of a NaN if there is one.
  __device__ BlockScale(const QuantParams& quant, uint32_t amax) {
    constexpr uint32_t kMinAmax = (127 - 90) << 23;
    const bool is_int8 = quant.dtype == QuantDType::kInt8,
               is_e4m3 = quant.dtype == QuantDType::kE4M3;
    amax = max(amax, kMinAmax);
    if (quant.scale_dtype == ScaleDType::kF32) {
      const float scale = __uint_as_float(amax) * (is_int8   ? 1 / 127.0f
                                                   : is_e4m3 ? 1 / 448.0f
                                                             : 1 / 57344.0f);
      bits = __float_as_uint(scale);
      inverse = __frcp_rn(scale);
    } else {
      const uint32_t exponent = amax >> 23, byte = exponent - (is_int8 ? 6 : is_e4m3 ? 8 : 15);
      const bool is_number = exponent < 255;
      bits = is_number ? byte : 255;
      inverse = __uint_as_float(is_number ? (254 - byte) << 23 : 0x7fc00000u);
    }
  }
};

__device__ __forceinline__ float QMax(QuantDType dtype) {
  return dtype == QuantDType::kInt8 ? 127.0f : dtype == QuantDType::kE4M3 ? 448.0f : 57344.0f;
}

// Two numbers, scaled and clamped already, as two bytes.
__device__ __forceinline__ uint32_t RoundPair(QuantDType dtype, float low, float high) {
  if (dtype == QuantDType::kE4M3) return ptx::cvt_e4m3x2(low, high);
  if (dtype == QuantDType::kE5M2) return ptx::cvt_e5m2x2(low, high);
  // A NaN becomes 0.
  return (__float2int_rn(low) & 0xff) | (__float2int_rn(high) & 0xff) << 8;
}

// Elements that a lane quantises at a time.
constexpr int kPerQuantLane = 8;

template <typename T>
__device__ __forceinline__ void LoadForQuant(const T* from, float (&out)[kPerQuantLane]) {
  constexpr int kVectors = kPerQuantLane / kPerVector<T>;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int4 v = ptx::ld_nc_no_allocate(reinterpret_cast<const int4*>(from) + i);
    Sum<T> elements[kPerVector<T>];
    Vector<T>::Unpack(v, elements);
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j)
      out[i * kPerVector<T> + j] = static_cast<float>(elements[j]);
  }
}

// The bytes of 8 elements that were divided by their scale.
__device__ __forceinline__ uint2 RoundAll(QuantDType dtype, const float (&in)[kPerQuantLane],
                                          float inverse) {
  const float qmax = QMax(dtype);
  uint32_t pairs[kPerQuantLane / 2];
#pragma unroll
  for (int i = 0; i < kPerQuantLane / 2; ++i) {
    float scaled[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float x = in[2 * i + j] * inverse;
      scaled[j] = x > qmax ? qmax : x < -qmax ? -qmax : x;
    }
    pairs[i] = RoundPair(dtype, scaled[0], scaled[1]);
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// Quantises a row of `hidden` elements, a multiple of 16, by warps `warp` of `warps`, and hands out
// what comes of it: `elements(first, bytes)`, where bytes are of one or of 8 elements, and
// `scale(block, bits)`.
template <typename T, typename Elements, typename Scale>
__device__ void QuantiseRow(const QuantParams& quant, const T* x, int hidden, int warp, int warps,
                            const Elements& elements, const Scale& scale) {
  constexpr int kPerWarp = 32 * kPerQuantLane;  // elements
  const int lane = threadIdx.x % 32, block = quant.block;
  const bool fits = block % kPerQuantLane == 0 && kPerWarp % block == 0;
  if (fits) {
    const int lanes = block / kPerQuantLane;
    // Several rounds at a time, so that enough loads are in flight.
    constexpr int kRounds = 4;
    for (int begin = warp * kPerWarp; begin < hidden; begin += kRounds * warps * kPerWarp) {
      float values[kRounds][kPerQuantLane];
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int first = begin + r * warps * kPerWarp + lane * kPerQuantLane;
        if (first < hidden) LoadForQuant(x + first, values[r]);
      }
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int first = begin + r * warps * kPerWarp + lane * kPerQuantLane;
        if (begin + r * warps * kPerWarp >= hidden) break;
        uint32_t amax = 0;
#pragma unroll
        for (int i = 0; i < kPerQuantLane; ++i)
          amax = first < hidden ? max(amax, __float_as_uint(values[r][i]) & 0x7fffffffu) : 0u;
        for (int step = lanes / 2; step > 0; step /= 2)
          amax = max(amax, __shfl_xor_sync(kAllLanes, amax, step));
        const BlockScale of_block(quant, amax);
        if (first >= hidden) continue;
        elements(first, RoundAll(quant.dtype, values[r], of_block.inverse));
        if (lane % lanes == 0) scale(first / block, of_block.bits);
      }
    }
    return;
  }
  // Blocks of any other size, each by one warp, which reads it twice.
  for (int number = warp; number < hidden / block; number += warps) {
    const T* of_block = x + number * block;
    uint32_t amax = 0;
    for (int i = lane; i < block; i += 32)
      amax = max(amax, __float_as_uint(ToFloat(of_block[i])) & 0x7fffffffu);
    for (int step = 16; step > 0; step /= 2)
      amax = max(amax, __shfl_xor_sync(kAllLanes, amax, step));
    const BlockScale block_scale(quant, amax);
    for (int i = lane; i < block; i += 32) {
      const float one[kPerQuantLane] = {ToFloat(of_block[i])};
      const uint2 bytes = RoundAll(quant.dtype, one, block_scale.inverse);
      elements(number * block + i, static_cast<uint8_t>(bytes.x));
    }
    if (lane == 0) scale(number, block_scale.bits);
  }
}

__device__ __forceinline__ void StoreScale(const QuantParams& quant, std::byte* scales, int number,
                                           uint32_t bits) {
  if (quant.scale_dtype == ScaleDType::kF32)
    reinterpret_cast<uint32_t*>(scales)[number] = bits;
  else
    scales[number] = static_cast<std::byte>(bits);
}

// What the scales of a poisoned step are.
__device__ __forceinline__ uint32_t NaNScale(const QuantParams& quant) {
  return quant.scale_dtype == ScaleDType::kF32 ? 0x7fc00000u : 0xffu;
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_QUANT_CUH_
