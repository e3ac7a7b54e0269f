"""Arrays as unsigned integers of the same bits, which nothing computes with."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def as_words(array):
    """Unsigned integers; complex numbers, which XLA does not cast, and bool stay what they are."""
    if array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    return lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize])


def from_words(words, dtype):
    return words if words.dtype == dtype else lax.bitcast_convert_type(words, dtype)
