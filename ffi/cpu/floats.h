// Float formats to and from the compiler's own, in a way that it vectorises.
#ifndef JAX_EP_CPU_FLOATS_H_
#define JAX_EP_CPU_FLOATS_H_

#include <cstdint>
#include <cstring>

// One binary serves every x86-64: the loader picks the widest version that the machine has. Levels,
// since one named after a processor is picked on no other. Sanitizers start before the loader can
// pick.
#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__) || \
    defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define JAX_EP_CLONES
#elif __GNUC__ >= 12
#define JAX_EP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JAX_EP_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#define JAX_EP_INLINE inline __attribute__((always_inline))

namespace jax_ep::cpu {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

JAX_EP_INLINE uint32_t Bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
JAX_EP_INLINE float FromBits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

JAX_EP_INLINE float Load(float x) { return x; }
JAX_EP_INLINE double Load(double x) { return x; }
JAX_EP_INLINE float Load(BF16 x) { return FromBits(uint32_t{x.bits} << 16); }
// Shifting puts the half's fields into a float's, 112 exponents too low; the product mends that,
// for subnormal halves too. Infinity and NaN keep their exponent at the top.
JAX_EP_INLINE float Load(F16 x) {
  const uint32_t sign = uint32_t{x.bits} << 16 & 0x80000000u;
  const uint32_t magnitude = uint32_t{x.bits} << 13 & 0x0fffe000u;
  const uint32_t finite = Bits(FromBits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return FromBits(sign | (magnitude >= 0x0f800000u ? special : finite));
}

JAX_EP_INLINE void Round(float x, float& out) { out = x; }
JAX_EP_INLINE void Round(double x, double& out) { out = x; }
// Round to nearest even: add half of the last kept place, or just under half when that place is
// even.
JAX_EP_INLINE void Round(float x, BF16& out) {
  const uint32_t u = Bits(x);
  const uint32_t rounded = u + 0x7fffu + (u >> 16 & 1u);
  const uint32_t quiet_nan = u | 0x400000u;
  out.bits = static_cast<uint16_t>(((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded) >> 16);
}
// Normal halves round like BF16, after moving the exponent down by 112. For subnormal ones, adding
// 0.5 aligns the bits that remain to the end of the float's mantissa, and the addition rounds.
JAX_EP_INLINE void Round(float x, F16& out) {
  const uint32_t u = Bits(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t subnormal = Bits(FromBits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t nan_or_inf = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t half = magnitude >= 0x477ff000u ? nan_or_inf : finite;
  out.bits = static_cast<uint16_t>(half | (u >> 16 & 0x8000u));
}

}  // namespace jax_ep::cpu

#endif  // JAX_EP_CPU_FLOATS_H_
