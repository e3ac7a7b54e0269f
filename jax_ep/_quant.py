"""What a quantised row is, in pure JAX: the definition that every backend meets bit for bit.

A row of H elements, as float32, is cut into blocks. Each block has a scale, and its elements are the row's times the
scale's inverse, rounded to the nearest, ties to even. With amax the block's largest magnitude, at least `MIN_AMAX`:

- float32 scales: amax times the float32 nearest to 1 / qmax, so that the largest element becomes qmax. The inverse is
  the float32 nearest to 1 / scale.
- float8_e8m0fnu scales, as in the OCP microscaling formats: the power of two that brings amax's exponent to that of
  qmax. What is above qmax then is rounded down to it.

A block with a NaN has a NaN for its scale, and all its elements are NaN, 0 in int8. So has one with an infinity where
scales are powers of two; a float32 scale is infinite then, infinities become NaN and all else 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep import _ffi
from jax_ep._checks import expect_dtype
from jax_ep.types import DispatchOutput, QuantConfig

# The largest magnitude of each type, and its exponent.
QMAX = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
_QMAX_EXPONENT = {"float8_e4m3fn": 8, "float8_e5m2": 15, "int8": 6}
# Keeps 1 / scale finite, and so small that no subnormal float32 becomes more than a zero: some hardware flushes them.
MIN_AMAX = 2.0**-90
_E8M0_BIAS = 127
SCALE_DTYPES = ("float32", "float8_e8m0fnu")


def quantize(x: jax.Array, quant: QuantConfig) -> tuple[jax.Array, jax.Array]:
    """`x` [N, H] -> elements [N, H] of `quant.dtype`, scales [N, H / block] of `quant.scale_dtype`."""
    name = jnp.dtype(quant.dtype).name
    blocks = x.astype(jnp.float32).reshape(x.shape[0], x.shape[1] // quant.block_size, quant.block_size)
    # As integers, where NaN are above all numbers: XLA's maximum of floats overlooks signalling ones on CPUs.
    magnitudes = lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    amax_bits = jnp.maximum(jnp.max(magnitudes, axis=-1), np.float32(MIN_AMAX).view(np.int32))
    if jnp.dtype(quant.scale_dtype) == jnp.float32:
        scales = lax.bitcast_convert_type(amax_bits, jnp.float32) * (np.float32(1) / np.float32(QMAX[name]))
        inverse = _reciprocal(scales)
    else:
        scales, inverse = _power_of_two_scales(amax_bits, _QMAX_EXPONENT[name])
    scaled = blocks * inverse[..., None]
    qmax = np.float32(QMAX[name])
    # A NaN stays one.
    scaled = jnp.where(scaled > qmax, qmax, jnp.where(scaled < -qmax, -qmax, scaled))
    if name == "int8":
        scaled = jnp.where(jnp.isnan(scaled), 0, jnp.round(scaled))
    return scaled.astype(quant.dtype).reshape(x.shape), scales


def _reciprocal(x: jax.Array) -> jax.Array:
    """The float32 nearest to 1 / x. XLA's float32 division is not always that exact; float64, rounded once more, is.

    The barrier keeps compilers from seeing that the whole could be done in float32.
    """
    with jax.enable_x64(True):
        return (1.0 / lax.optimization_barrier(x.astype(jnp.float64))).astype(jnp.float32)


def _power_of_two_scales(amax_bits: jax.Array, qmax_exponent: int) -> tuple[jax.Array, jax.Array]:
    """The scales, and float32 that the elements are multiplied by."""
    exponent = amax_bits >> 23  # biased; 255 for infinity and NaN
    byte = exponent - qmax_exponent  # at least 22, for MIN_AMAX
    is_number = exponent < 255
    inverse = lax.bitcast_convert_type((2 * _E8M0_BIAS - byte) << 23, jnp.float32)
    byte = jnp.where(is_number, byte, 255).astype(jnp.uint8)
    return lax.bitcast_convert_type(byte, jnp.float8_e8m0fnu), jnp.where(is_number, inverse, jnp.nan)


def scale_values(scales: jax.Array) -> jax.Array:
    """Scales of any type as float32."""
    if scales.dtype == jnp.float32:
        return scales
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    value = jnp.where(byte == 0, np.float32(2.0**-127), lax.bitcast_convert_type(byte << 23, jnp.float32))
    return jnp.where(byte == 255, jnp.nan, value)


def dequantize(out: DispatchOutput, dtype=jnp.bfloat16) -> jax.Array:
    """The tokens of a quantised `out` times their scales, in `dtype`: `[C, H]`, or `[L, S, H]` for `EXPERT_MAJOR`.

    The way to differentiate through quantised rows: their gradient goes back in the communicator's dtype, as if they
    had not been quantised (straight-through). Rows that were quantised before dispatch have none.

    Args:
      out: of a `dispatch` with `quant`.
      dtype: of the result; products are made in float32.

    Raises:
      ValueError, TypeError: `out` is nothing of the kind, its rows are not quantised, or `dtype` is no floating dtype.
    """
    if not isinstance(out, DispatchOutput):
        raise TypeError(f"out: expected a DispatchOutput, got {type(out).__name__}")
    dtype = expect_dtype("dtype", dtype, _ffi.DTYPES)
    if out.quant is None:
        raise ValueError("out: expected the output of a dispatch with quant, got plain rows")
    elements, scales = lax.stop_gradient((out.tokens, out.quant.scales))
    return _dequantize(dtype, elements, scales, out.quant.straight_through)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dequantize(dtype, elements: jax.Array, scales: jax.Array, straight_through: jax.Array | None) -> jax.Array:
    """Rows [..., H] times scales [..., H / block]; the gradient goes to `straight_through` alone."""
    del straight_through
    factors = jnp.repeat(scale_values(scales), elements.shape[-1] // scales.shape[-1], axis=-1)
    return (elements.astype(jnp.float32) * factors).astype(dtype)


def _dequantize_forward(dtype, elements, scales, straight_through):
    like = None if straight_through is None else jnp.zeros((), straight_through.dtype)
    return _dequantize(dtype, elements, scales, straight_through), like


def _dequantize_backward(dtype, like, gradient):
    del dtype
    return None, None, None if like is None else gradient.astype(like.dtype)


_dequantize.defvjp(_dequantize_forward, _dequantize_backward)


def guard(tokens: jax.Array, scales: jax.Array, straight_through: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Quantised rows and their scales, which nothing may be differentiated through: such gradients would be as coarse
    as they are, or silently nothing. What came quantised is a constant."""
    if straight_through is None:
        return lax.stop_gradient((tokens, scales))
    return _refusing_gradients(tokens, scales, straight_through)


@jax.custom_vjp
def _refusing_gradients(tokens, scales, straight_through):
    del straight_through  # but its being differentiated makes JAX ask for the rule
    return tokens, scales


def _refuse(*_):
    raise TypeError(
        "tokens: expected a gradient by way of jax_ep.dequantize(out), got one of quantised tokens or their scales "
        "themselves, which have none"
    )


_refusing_gradients.defvjp(lambda tokens, scales, _: ((tokens, scales), None), _refuse)
