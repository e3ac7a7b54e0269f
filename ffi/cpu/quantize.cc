#include "cpu/quantize.h"

#include <algorithm>
#include <cstring>

#include "cpu/floats.h"
#include "cpu/rows.h"

namespace jax_ep::cpu {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;

// Smaller blocks are scaled like this one: a float's subnormals then are zeros, whether or not they
// are flushed. XLA's threads flush them, ours do not.
constexpr float kMinAmax = 0x1p-90f;

// To nearest and ties to even, as in floats.h: adding aligns what is subnormal here to the end of a
// float's mantissa. Takes numbers up to the format's largest, and NaN.
template <int kMantissaBits, int kMinExponent>
JAX_EP_INLINE uint8_t EncodeFloat8(float x) {
  constexpr int kShift = 23 - kMantissaBits;
  constexpr uint32_t kSmallestNormal = (kMinExponent + 127) << 23;
  constexpr uint32_t kAligner = (kMinExponent + kShift + 127) << 23;
  const uint32_t u = Bits(x), magnitude = u & kMagnitude;
  const uint32_t half = (1u << (kShift - 1)) - 1 + (magnitude >> kShift & 1u);
  const uint32_t normal = (magnitude - kSmallestNormal + (1u << 23) + half) >> kShift;
  const uint32_t subnormal = Bits(FromBits(magnitude) + FromBits(kAligner)) - kAligner;
  const uint32_t number = magnitude < kSmallestNormal ? subnormal : normal;
  return static_cast<uint8_t>((magnitude > kInfinity ? 0x7fu : number) | (u >> 24 & 0x80u));
}

// What the scaled elements are clamped to, its exponent, and how they are stored.
template <QuantDType>
struct Element;
template <>
struct Element<QuantDType::kE4M3> {
  static constexpr float kMax = 448.0f;
  static constexpr int kMaxExponent = 8;
  static JAX_EP_INLINE uint8_t Encode(float x) { return EncodeFloat8<3, -6>(x); }
};
template <>
struct Element<QuantDType::kE5M2> {
  static constexpr float kMax = 57344.0f;
  static constexpr int kMaxExponent = 15;
  static JAX_EP_INLINE uint8_t Encode(float x) { return EncodeFloat8<2, -14>(x); }
};
template <>
struct Element<QuantDType::kInt8> {
  static constexpr float kMax = 127.0f;
  static constexpr int kMaxExponent = 6;
  // The sum's last place is 1, and its low byte the rounded number's. NaN becomes 0.
  static JAX_EP_INLINE uint8_t Encode(float x) {
    const uint32_t rounded = Bits(x + 0x1.8p23f);
    return static_cast<uint8_t>((Bits(x) & kMagnitude) > kInfinity ? 0u : rounded);
  }
};

// Both store the scale of block `i` and return what its elements are multiplied by. A NaN stays
// one.
JAX_EP_INLINE float PutFloatScale(float amax, float max, std::byte* scales, int64_t i) {
  const float scale = amax * (1.0f / max);
  std::memcpy(scales + i * sizeof scale, &scale, sizeof scale);
  return 1.0f / scale;
}
JAX_EP_INLINE float PutPowerOfTwoScale(float amax, int max_exponent, std::byte* scales, int64_t i) {
  const uint32_t exponent = Bits(amax) >> 23;  // biased; 255 for infinity and NaN
  const uint32_t biased = exponent - max_exponent;
  scales[i] = static_cast<std::byte>(exponent < 255 ? biased : 255);
  return FromBits(exponent < 255 ? (254 - biased) << 23 : 0x7fc00000u);
}

template <typename T>
JAX_EP_INLINE void WidenLoop(float* __restrict out, const T* __restrict row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(Load(row[i]));
}

template <QuantDType kDType>
JAX_EP_INLINE void QuantizeLoop(const float* __restrict row, int64_t n, const QuantParams& quant,
                                uint8_t* __restrict elements, std::byte* __restrict scales) {
  using E = Element<kDType>;
  const int64_t block = quant.block;
  const bool is_float = quant.scale_dtype == ScaleDType::kF32;
  for (int64_t at = 0, i = 0; at < n; at += block, ++i) {
    // Magnitudes are ordered as integers, with infinity and then NaN on top.
    uint32_t largest = Bits(kMinAmax);
    for (int64_t j = at; j < at + block; ++j) {
      const uint32_t magnitude = Bits(row[j]) & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float amax = FromBits(largest);
    const float inverse = is_float ? PutFloatScale(amax, E::kMax, scales, i)
                                   : PutPowerOfTwoScale(amax, E::kMaxExponent, scales, i);
    for (int64_t j = at; j < at + block; ++j) {
      float scaled = row[j] * inverse;
      scaled = scaled > E::kMax ? E::kMax : scaled;
      scaled = scaled < -E::kMax ? -E::kMax : scaled;
      elements[j] = E::Encode(scaled);
    }
  }
}

}  // namespace

// The loader's choice is between symbols that it sees.
template <typename T>
void WidenRow(float* out, const T* row, int64_t n);
template <QuantDType kDType>
void QuantizeBlocks(const float* row, int64_t n, const QuantParams& quant, uint8_t* elements,
                    std::byte* scales);

#define JAX_EP_WIDEN_ROW(T)                                             \
  template <>                                                           \
  JAX_EP_CLONES void WidenRow<T>(float* out, const T* row, int64_t n) { \
    WidenLoop<T>(out, row, n);                                          \
  }
#define JAX_EP_QUANTIZE_BLOCKS(D)                                                             \
  template <>                                                                                 \
  JAX_EP_CLONES void QuantizeBlocks<D>(const float* row, int64_t n, const QuantParams& quant, \
                                       uint8_t* elements, std::byte* scales) {                \
    QuantizeLoop<D>(row, n, quant, elements, scales);                                         \
  }

JAX_EP_WIDEN_ROW(F16)
JAX_EP_WIDEN_ROW(BF16)
JAX_EP_WIDEN_ROW(float)
JAX_EP_WIDEN_ROW(double)
JAX_EP_QUANTIZE_BLOCKS(QuantDType::kE4M3)
JAX_EP_QUANTIZE_BLOCKS(QuantDType::kE5M2)
JAX_EP_QUANTIZE_BLOCKS(QuantDType::kInt8)

void QuantizeRow(DType dtype, const QuantParams& quant, const std::byte* row, int64_t n,
                 float* widened, std::byte* elements, std::byte* scales) {
  VisitDType(dtype, [&](auto* t) {
    WidenRow(widened, reinterpret_cast<const std::remove_pointer_t<decltype(t)>*>(row), n);
  });
  auto* bytes = reinterpret_cast<uint8_t*>(elements);
  switch (quant.dtype) {
    case QuantDType::kE4M3:
      return QuantizeBlocks<QuantDType::kE4M3>(widened, n, quant, bytes, scales);
    case QuantDType::kE5M2:
      return QuantizeBlocks<QuantDType::kE5M2>(widened, n, quant, bytes, scales);
    case QuantDType::kInt8:
      return QuantizeBlocks<QuantDType::kInt8>(widened, n, quant, bytes, scales);
  }
}

}  // namespace jax_ep::cpu
