#include "cpu/rows.h"

#include <cstring>
#include <limits>

// One binary serves every x86-64: the loader picks the widest version that the machine has.
// Sanitizers start before the loader can pick.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define JAX_EP_CLONES \
  __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define JAX_EP_CLONES
#endif
#define JAX_EP_INLINE inline __attribute__((always_inline))

namespace jax_ep::cpu {
namespace {

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

template <typename T>
JAX_EP_INLINE Sum<T> Rounded(Sum<T> x) {
  T out;
  Round(x, out);
  return Load(out);
}

template <typename T>
JAX_EP_INLINE void AddScaledLoop(Sum<T>* __restrict sum, const T* __restrict row, float weight,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += Sum<T>{weight} * Load(row[i]);
}
template <typename T>
JAX_EP_INLINE void AddRoundedLoop(Sum<T>* __restrict total, const Sum<T>* __restrict sum,
                                  int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += Rounded<T>(sum[i]);
}
template <typename T>
JAX_EP_INLINE void StoreLoop(T* __restrict row, const Sum<T>* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) Round(sum[i], row[i]);
}
template <typename T>
JAX_EP_INLINE void ScaleLoop(T* __restrict out, const T* __restrict row, float weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) Round(Sum<T>{weight} * Load(row[i]), out[i]);
}
template <typename T>
JAX_EP_INLINE float DotLoop(const T* __restrict a, const T* __restrict b, int64_t n) {
  constexpr int64_t kLanes = 16;
  Sum<T> lanes[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += Load(a[i + j]) * Load(b[i + j]);
  for (int64_t j = 0; j < n - whole; ++j) lanes[j] += Load(a[whole + j]) * Load(b[whole + j]);
  Sum<T> sum = 0;
  for (const Sum<T> lane : lanes) sum += lane;
  return static_cast<float>(sum);
}

}  // namespace

template <typename T>
void FillNaN(T* row, int64_t n) {
  T nan;
  Round(std::numeric_limits<Sum<T>>::quiet_NaN(), nan);
  for (int64_t i = 0; i < n; ++i) row[i] = nan;
}

#define JAX_EP_ROWS_OF(T)                                                                \
  template <>                                                                            \
  JAX_EP_CLONES void AddScaled<T>(Sum<T> * sum, const T* row, float weight, int64_t n) { \
    AddScaledLoop<T>(sum, row, weight, n);                                               \
  }                                                                                      \
  template <>                                                                            \
  JAX_EP_CLONES void AddRounded<T>(Sum<T> * total, const Sum<T>* sum, int64_t n) {       \
    AddRoundedLoop<T>(total, sum, n);                                                    \
  }                                                                                      \
  template <>                                                                            \
  JAX_EP_CLONES void Store<T>(T * row, const Sum<T>* sum, int64_t n) {                   \
    StoreLoop<T>(row, sum, n);                                                           \
  }                                                                                      \
  template <>                                                                            \
  JAX_EP_CLONES void Scale<T>(T * out, const T* row, float weight, int64_t n) {          \
    ScaleLoop<T>(out, row, weight, n);                                                   \
  }                                                                                      \
  template <>                                                                            \
  JAX_EP_CLONES float Dot<T>(const T* a, const T* b, int64_t n) {                        \
    return DotLoop<T>(a, b, n);                                                          \
  }                                                                                      \
  template void FillNaN<T>(T*, int64_t);

JAX_EP_ROWS_OF(F16)
JAX_EP_ROWS_OF(BF16)
JAX_EP_ROWS_OF(float)
JAX_EP_ROWS_OF(double)

}  // namespace jax_ep::cpu
