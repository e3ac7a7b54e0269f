// See emulator.h.
#ifndef JAX_EP_TESTS_EMULATOR_FP16_H_
#define JAX_EP_TESTS_EMULATOR_FP16_H_

#include "emulator.h"

struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half x) { return x.value; }
inline float2 __half22float2(__half2 pair) { return {pair.x.value, pair.y.value}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {{static_cast<_Float16>(x)}, {static_cast<_Float16>(y)}};
}

#endif  // JAX_EP_TESTS_EMULATOR_FP16_H_
