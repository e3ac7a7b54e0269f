// Arithmetic on rows of any float dtype, vectorised by the compiler for the machine it runs on.
#ifndef JAX_EP_CPU_ROWS_H_
#define JAX_EP_CPU_ROWS_H_

#include <cstdint>
#include <type_traits>

#include "common/layout.h"
#include "cpu/floats.h"

namespace jax_ep::cpu {

// Sums are kept in float, except those of double rows.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// sum[i] += weight * row[i]
template <typename T>
void AddScaled(Sum<T>* sum, const T* row, float weight, int64_t n);
// total[i] += sum[i] rounded to T: what a partial sum looks like after it crossed a link as T.
template <typename T>
void AddRounded(Sum<T>* total, const Sum<T>* sum, int64_t n);
template <typename T>
void Store(T* row, const Sum<T>* sum, int64_t n);
// out[i] = weight * row[i]
template <typename T>
void Scale(T* out, const T* row, float weight, int64_t n);
// The products are added in 16 fixed lanes, so that the result does not depend on the machine's
// vectors.
template <typename T>
float Dot(const T* a, const T* b, int64_t n);
template <typename T>
void FillNaN(T* row, int64_t n);

// Calls f with a null T* that names the element type of `dtype`.
template <typename F>
decltype(auto) VisitDType(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF16:
      return f(static_cast<F16*>(nullptr));
    case DType::kBF16:
      return f(static_cast<BF16*>(nullptr));
    case DType::kF64:
      return f(static_cast<double*>(nullptr));
    case DType::kF32:
      break;
  }
  return f(static_cast<float*>(nullptr));
}

}  // namespace jax_ep::cpu

#endif  // JAX_EP_CPU_ROWS_H_
