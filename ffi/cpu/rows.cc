#include "cpu/rows.h"

#include <limits>

#include "cpu/floats.h"

namespace jax_ep::cpu {
namespace {

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
