"""The experts' grouped matrix product, where the user brings none."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def default_grouped_matmul(implementation: str | None) -> Callable[..., jax.Array]:
    """`(rows [C, X], kernels [L, X, Y], group_sizes int32 [L]) -> [C, Y]` for a communicator's `implementation`.

    On GPUs tokamax's, where it is installed: what XLA makes of `jax.lax.ragged_dot` there takes up to 30 times as long,
    see docs/performance.md.
    """
    return _tokamax_ragged_dot if implementation == "cuda" and _has_tokamax() else jax.lax.ragged_dot


@functools.cache
def _has_tokamax() -> bool:
    try:
        import tokamax  # noqa: F401
    except ImportError:  # also of what it needs itself: Python 3.12, jax 0.11.1
        return False
    return True


# Its kernels, those of the backward pass too, mix dtypes, which a user may have forbidden: so a rule of our own.
_as_tokamax_needs = functools.partial(jax.numpy_dtype_promotion, "standard")


@jax.custom_vjp
def _tokamax_ragged_dot(rows, kernels, group_sizes):
    return _forward(rows, kernels, group_sizes)[0]


def _forward(rows, kernels, group_sizes):
    import tokamax

    with _as_tokamax_needs():
        return jax.vjp(lambda rows, kernels: tokamax.ragged_dot(rows, kernels, group_sizes), rows, kernels)


def _backward(pull, gradient):
    with _as_tokamax_needs():
        return *pull(gradient), None


_tokamax_ragged_dot.defvjp(_forward, _backward)
