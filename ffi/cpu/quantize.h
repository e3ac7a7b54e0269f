// Quantised rows as jax_ep/_quant.py defines them, bit for bit.
#ifndef JAX_EP_CPU_QUANTIZE_H_
#define JAX_EP_CPU_QUANTIZE_H_

#include <cstddef>
#include <cstdint>

#include "common/ops.h"

namespace jax_ep::cpu {

// Quantises `n` numbers of type `dtype`, a multiple of quant.block, into as many bytes and a scale
// for each block. `widened` is room for `n` floats.
void QuantizeRow(DType dtype, const QuantParams& quant, const std::byte* row, int64_t n,
                 float* widened, std::byte* elements, std::byte* scales);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_CPU_QUANTIZE_H_
