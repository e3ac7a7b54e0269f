"""Slots as rows of bytes: what leaves a rank, and where it is put. Traced per device; every bit is kept.

A device's part of an array is `[S, W]`: S slots of W elements. A slot is sent as rows of `row_bytes` bytes, the last of
which begins early enough to be full: it repeats bytes of the one before. Only a slot smaller than a row is padded.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep._checks import expect
from jax_ep._words import WORDS, as_words, bits_of, from_words

# XLA for CPUs converts some types to float32 and back where it scatters them, which changes NaNs.
_MOVED_BITWISE_ON_GPUS = {"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"}


def expect_movable(argument: str, dtype) -> None:
    """JAX lets us see the bits."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    expect(is_complex or bits_of(dtype) in (2, 4, *WORDS), argument, "a dtype of numbers, or bool", dtype)


def elements_per_row(dtype, row_bytes: int) -> int:
    return row_bytes // jnp.dtype(dtype).itemsize


def rows_per_slot(size: int, dtype, row_bytes: int) -> int:
    """Rows of a slot of `size` elements."""
    return -(-size // elements_per_row(dtype, row_bytes))


def slots_view(array, num_slot_dims: int):
    """`[..., ...]` as `[S, W]`, its first dimensions in one."""
    return array.reshape(math.prod(array.shape[:num_slot_dims]), math.prod(array.shape[num_slot_dims:]))


def slot_size(array: jax.Array, num_slot_dims: int) -> int:
    """Elements of a slot on its device."""
    return math.prod(array.sharding.shard_shape(array.shape)[num_slot_dims:])


def is_scattered_bitwise(dtype, platform: str) -> bool:
    dtype = jnp.dtype(dtype)
    if bits_of(dtype) < 8:
        return False
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        return platform != "cpu" and dtype.name in _MOVED_BITWISE_ON_GPUS
    return True


def take_slots(slots, index):
    """The slots `[S, W]` by `index` int32 `[N]`; zeros for -1."""
    words = as_words(slots)
    taken = jnp.take(words, jnp.maximum(index, 0), axis=0, mode="clip")
    return from_words(jnp.where((index >= 0)[:, None], taken, jnp.zeros((), words.dtype)), slots.dtype)


def gather_rows(slots, slot, row, row_bytes: int):
    """`uint16 [N, row_bytes / 2]`: rows `row` of slots `slot`, both int32 `[N]`, of `[S, W]`."""
    size = slots.shape[1]
    length = min(size, elements_per_row(slots.dtype, row_bytes))
    dims = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    rows = lax.gather(
        as_words(slots), _starts(slot, row, size, length), dims, (1, length), mode=lax.GatherScatterMode.CLIP
    )
    return _to_bytes(rows, row_bytes)


def scatter_rows(slots, slot, row, rows, row_bytes: int):
    """`[S, W]` with rows `uint16 [N, row_bytes / 2]` where they belong; those of a slot beyond S are left out."""
    size = slots.shape[1]
    length = min(size, elements_per_row(slots.dtype, row_bytes))
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    # Where two rows overlap they hold the same, so it does not matter which is written last.
    return lax.scatter(
        slots,
        _starts(slot, row, size, length),
        _from_bytes(rows, length, slots.dtype),
        dims,
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )


def _starts(slot, row, size: int, length: int):
    return jnp.stack([slot, jnp.minimum(row * length, size - length)], axis=1)


def _to_bytes(rows, row_bytes: int):
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        num_rows, length = rows.shape
        pairs = jnp.stack([as_words(lax.real(rows)), as_words(lax.imag(rows))], axis=-1)
        rows = pairs.reshape(num_rows, 2 * length)
    elif rows.dtype == jnp.bool_:
        rows = rows.astype(jnp.uint8)
    itemsize = rows.dtype.itemsize
    rows = jnp.pad(rows, ((0, 0), (0, row_bytes // itemsize - rows.shape[1])))
    if itemsize == 1:
        rows = rows.reshape(rows.shape[0], row_bytes // 2, 2)
    return lax.bitcast_convert_type(rows, jnp.uint16).reshape(rows.shape[0], row_bytes // 2)


def _from_bytes(rows, length: int, dtype):
    dtype = jnp.dtype(dtype)
    return from_words(_words_of(rows, length, dtype), dtype)


def _words_of(rows, length: int, dtype: jnp.dtype):
    num_rows, row_bytes = rows.shape[0], 2 * rows.shape[1]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        part = jnp.float32 if dtype.itemsize == 8 else jnp.float64
        pairs = _from_bytes(rows, 2 * length, part).reshape(num_rows, length, 2)
        return lax.complex(pairs[..., 0], pairs[..., 1])
    per_word = dtype.itemsize // 2
    if per_word > 1:
        rows = rows.reshape(num_rows, row_bytes // dtype.itemsize, per_word)
    words = lax.bitcast_convert_type(rows, WORDS[8 * dtype.itemsize])
    words = words.reshape(num_rows, row_bytes // dtype.itemsize)[:, :length]
    return words != 0 if dtype == jnp.bool_ else words


def pack(arrays: list[jax.Array | np.ndarray], num_rows: int, row_bytes: int, device: jax.Device) -> jax.Array:
    """`uint16 [num_rows, row_bytes / 2]`: the arrays one after the other, each in rows of its own, and zeros.

    Each shape has a program of its own, so that another list of them compiles none; numpy's arrays need none.
    """
    rows = [rows_per_slot(array.size, array.dtype, row_bytes) for array in arrays]
    placed = [(array, begin) for array, begin in zip(arrays, _begins(rows), strict=False) if array.size]
    if any(isinstance(array, np.ndarray) for array in arrays):
        data = np.zeros(num_rows * row_bytes, np.uint8)
        for array, begin in placed:
            if isinstance(array, np.ndarray):
                data[begin * row_bytes :][: array.nbytes] = np.ravel(array).view(np.uint8)
        packed = jax.device_put(data.view(np.uint16).reshape(num_rows, -1), device)
    else:
        packed = jnp.zeros((num_rows, row_bytes // 2), jnp.uint16, device=device)
    for array, begin in placed:
        if not isinstance(array, np.ndarray):
            packed = _put(packed, array, begin, row_bytes)
    return packed


def unpack(packed: jax.Array, like: list[tuple[tuple[int, ...], str]], row_bytes: int) -> list[jax.Array]:
    """The arrays of these shapes and dtypes that `pack` put there."""
    begins = _begins([rows_per_slot(math.prod(shape), name, row_bytes) for shape, name in like])
    return [_get(packed, begin, shape, name, row_bytes) for begin, (shape, name) in zip(begins, like, strict=False)]


def _begins(rows: list[int]) -> list[np.int32]:
    return list(np.cumsum([0, *rows], dtype=np.int32))


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(packed, array, begin, row_bytes: int):
    length = elements_per_row(array.dtype, row_bytes)
    rows = rows_per_slot(array.size, array.dtype, row_bytes)
    words = jnp.pad(as_words(array.reshape(-1)), (0, rows * length - array.size)).reshape(rows, length)
    return lax.dynamic_update_slice_in_dim(packed, _to_bytes(words, row_bytes), begin, 0)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _get(packed, begin, shape: tuple[int, ...], name: str, row_bytes: int):
    dtype, size = jnp.dtype(name), math.prod(shape)
    rows = lax.dynamic_slice_in_dim(packed, begin, rows_per_slot(size, dtype, row_bytes), 0)
    words = _words_of(rows, elements_per_row(dtype, row_bytes), dtype)
    return from_words(words.reshape(-1)[:size].reshape(shape), dtype)
