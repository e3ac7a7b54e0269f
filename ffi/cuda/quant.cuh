// Quantised rows, as jax_ep/_quant.py defines them bit for bit.
#ifndef JAX_EP_CUDA_QUANT_CUH_
#define JAX_EP_CUDA_QUANT_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

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

// Two numbers that were divided by their scale, as two bytes; beyond the largest finite one, that.
template <QuantDType kDType>
__device__ __forceinline__ uint32_t RoundPair(float low, float high) {
  if constexpr (kDType == QuantDType::kE4M3) return ptx::cvt_e4m3x2(low, high);
  if constexpr (kDType == QuantDType::kE5M2) return ptx::cvt_e5m2x2(low, high);
  // A NaN becomes 0.
  const auto round = [](float x) {
    return __float2int_rn(x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x) & 0xff;
  };
  return round(low) | round(high) << 8;
}

// Calls `visit` with an integral_constant of `dtype`.
template <typename F>
__device__ __forceinline__ void VisitQuantDType(QuantDType dtype, const F& visit) {
  using std::integral_constant;
  if (dtype == QuantDType::kE4M3)
    visit(integral_constant<QuantDType, QuantDType::kE4M3>());
  else if (dtype == QuantDType::kE5M2)
    visit(integral_constant<QuantDType, QuantDType::kE5M2>());
  else
    visit(integral_constant<QuantDType, QuantDType::kInt8>());
}

// Neighbouring elements that a lane quantises at a time: their bytes fill a vector.
constexpr int kPerQuantLane = 16;

template <typename T>
struct QuantElements {
  static constexpr int kVectors = kPerQuantLane / kPerVector<T>;
  int4 vectors[kVectors];

  __device__ __forceinline__ void Load(const T* from) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      vectors[i] = ptx::ld_nc_no_allocate(reinterpret_cast<const int4*>(from) + i);
  }
  __device__ __forceinline__ void Unpack(float (&out)[kPerQuantLane]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Sum<T> elements[kPerVector<T>];
      Vector<T>::Unpack(vectors[i], elements);
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j)
        out[i * kPerVector<T> + j] = static_cast<float>(elements[j]);
    }
  }
};

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

// Rows that get the same quantised token at a time; of a window, or of shared memory.
constexpr int kMaxQuantRows = 4;
struct QuantRows {
  int count = 0;
  QuantRow rows[kMaxQuantRows];
};

// Quantises a row of `hidden` elements, a multiple of 32, into `to`, by warps `warp` of `warps`.
// Blocks are of 16 to 512 elements and a power of two.
template <QuantDType kDType, typename T>
__device__ __forceinline__ void QuantiseBlocks(const QuantParams& quant, const T* x, int hidden,
                                               int warp, int warps, const QuantRows& to) {
  constexpr int kPerWarp = 32 * kPerQuantLane;  // elements
  // Several rounds at a time, so that enough loads are in flight.
  constexpr int kRounds = 16 / sizeof(T) > 4 ? 4 : 1;
  const int lane = threadIdx.x % 32, lanes = quant.block / kPerQuantLane, shift = __ffs(lanes) - 1;
  for (int begin = warp * kPerWarp; begin < hidden; begin += kRounds * warps * kPerWarp) {
    QuantElements<T> loaded[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
      if (const int first = begin + r * warps * kPerWarp + lane * kPerQuantLane; first < hidden)
        loaded[r].Load(x + first);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int first = begin + r * warps * kPerWarp + lane * kPerQuantLane;
      if (begin + r * warps * kPerWarp >= hidden) break;
      float values[kPerQuantLane];
      loaded[r].Unpack(values);
      float amax = 0;
#pragma unroll
      for (int i = 0; i < kPerQuantLane; ++i) amax = ptx::max_nan(amax, fabsf(values[i]));
      for (int step = lanes / 2; step > 0; step /= 2)
        amax = ptx::max_nan(amax, __shfl_xor_sync(kAllLanes, amax, step));
      if (first >= hidden) continue;
      const BlockScale scale(quant, __float_as_uint(amax));
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* four = values + 4 * i;
        words[i] = RoundPair<kDType>(four[0] * scale.inverse, four[1] * scale.inverse) |
                   RoundPair<kDType>(four[2] * scale.inverse, four[3] * scale.inverse) << 16;
      }
#pragma unroll
      for (int i = 0; i < kMaxQuantRows; ++i) {
        if (i == to.count) break;
        *reinterpret_cast<int4*>(to.rows[i].elements + first) =
            make_int4(words[0], words[1], words[2], words[3]);
        if (lane % lanes == 0)
          StoreScale(quant, to.rows[i].scales, first / kPerQuantLane >> shift, scale.bits);
      }
    }
  }
}

// The same for blocks of any size, each by one warp, which reads it twice.
template <QuantDType kDType, typename T>
__device__ void QuantiseOddBlocks(const QuantParams& quant, const T* x, int hidden, int warp,
                                  int warps, const QuantRows& to) {
  const int lane = threadIdx.x % 32, block = quant.block;
  for (int number = warp; number < hidden / block; number += warps) {
    const T* of_block = x + number * block;
    float amax = 0;
    for (int i = lane; i < block; i += 32) amax = ptx::max_nan(amax, fabsf(ToFloat(of_block[i])));
    for (int step = 16; step > 0; step /= 2)
      amax = ptx::max_nan(amax, __shfl_xor_sync(kAllLanes, amax, step));
    const BlockScale scale(quant, __float_as_uint(amax));
    for (int row = 0; row < to.count; ++row) {
      for (int i = lane; i < block; i += 32)
        to.rows[row].elements[number * block + i] =
            static_cast<std::byte>(RoundPair<kDType>(ToFloat(of_block[i]) * scale.inverse, 0.0f));
      if (lane == 0) StoreScale(quant, to.rows[row].scales, number, scale.bits);
    }
  }
}

template <typename T>
__device__ void QuantiseRow(const QuantParams& quant, const T* x, int hidden, int warp, int warps,
                            const QuantRows& to) {
  const int block = quant.block;
  const bool is_even = block % kPerQuantLane == 0 && 32 * kPerQuantLane % block == 0;
  VisitQuantDType(quant.dtype, [&](auto dtype) {
    if (is_even)
      QuantiseBlocks<decltype(dtype)::value>(quant, x, hidden, warp, warps, to);
    else
      QuantiseOddBlocks<decltype(dtype)::value>(quant, x, hidden, warp, warps, to);
  });
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_QUANT_CUH_
