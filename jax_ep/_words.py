"""Arrays as unsigned integers of the same bits, which nothing computes with."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

WORDS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}
# Elements that do not fill a byte get one each.
_PARTS_OF_BYTES = {2: jnp.uint2, 4: jnp.uint4}


def bits_of(dtype) -> int:
    """Of an element; 0 if they cannot be seen."""
    if dtype == jnp.bool_:
        return 8
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * dtype.itemsize if jnp.issubdtype(dtype, jnp.complexfloating) else 0


def as_words(array):
    """Unsigned integers of whole bytes; complex numbers, which XLA does not cast, and bool stay what they are."""
    if array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    bits = bits_of(array.dtype)
    if bits in _PARTS_OF_BYTES:
        return lax.bitcast_convert_type(array, _PARTS_OF_BYTES[bits]).astype(jnp.uint8)
    return lax.bitcast_convert_type(array, WORDS[bits])


def from_words(words, dtype):
    if words.dtype == dtype:
        return words
    bits = bits_of(dtype)
    if bits in _PARTS_OF_BYTES:
        words = words.astype(_PARTS_OF_BYTES[bits])
    return lax.bitcast_convert_type(words, dtype)
