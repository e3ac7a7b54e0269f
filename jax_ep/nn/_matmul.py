"""The experts' grouped matrix product, where the user brings none."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_ep._ffi import vary, varying_axes


def default_grouped_matmul(implementation: str | None) -> Callable[..., jax.Array]:
    """The grouped matrix product that `MoE` takes where it is given none, for layers of your own.

    On GPUs it is tokamax's, where tokamax is installed: what XLA makes of `jax.lax.ragged_dot` there took over 30 times
    as long, see docs/performance.md. Anywhere else it is `jax.lax.ragged_dot`.

    JAX refuses tokamax's own gradient inside `jax.shard_map`; this product has one that works there. As it is now,
    that has been run with tokamax on CPUs, not yet on a GPU.

    Args:
      implementation: `comm.config.implementation` of the communicator that the rows come from. tokamax's is for "cuda".

    Returns:
      A function of rows `[C, X]`, sorted by group, kernels `[L, X, Y]` of the same dtype and group sizes int32 `[L]`.
      It returns `[C, Y]`: each row times its group's kernel, in the rows' dtype. Differentiable in rows and kernels, in
      reverse mode. Rows beyond all groups are zero where tokamax multiplies, and so are their gradients.
    """
    return _tokamax_ragged_dot if implementation == "cuda" and _has_tokamax() else jax.lax.ragged_dot


@functools.cache
def _has_tokamax() -> bool:
    try:
        import tokamax  # noqa: F401
    except ImportError:  # also of what it needs itself: Python 3.12, jax 0.11.1
        return False
    return True


def _tokamax_ragged_dot(rows, kernels, group_sizes):
    # Here, where JAX sees it: gradients of kernels that are the same on several devices are summed over those.
    axes = varying_axes(rows) | varying_axes(kernels) | varying_axes(group_sizes)
    return _multiplied(*(vary(operand, axes) for operand in (rows, kernels, group_sizes)))


@jax.custom_vjp
def _multiplied(rows, kernels, group_sizes):
    return _call_tokamax("ragged_dot", rows, kernels, group_sizes, rows.dtype)


def _forward(rows, kernels, group_sizes):
    return _multiplied(rows, kernels, group_sizes), (rows, kernels, group_sizes)


def _dimensions(contracted: tuple[int, int], groups: list[int]) -> jax.lax.RaggedDotDimensionNumbers:
    left, right = contracted
    return jax.lax.RaggedDotDimensionNumbers((((left,), (right,)), ((), ())), [0], groups)


def _backward(operands, gradient):
    rows, kernels, group_sizes = operands
    of_rows = dict(ragged_dot_dimension_numbers=_dimensions((1, 2), [0]))
    of_kernels = dict(ragged_dot_dimension_numbers=_dimensions((0, 0), []))
    return (
        _call_tokamax("ragged_dot_general", gradient, kernels, group_sizes, rows.dtype, **of_rows),
        _call_tokamax("ragged_dot_general", rows, gradient, group_sizes, kernels.dtype, **of_kernels),
        None,
    )


_multiplied.defvjp(_forward, _backward)


def _call_tokamax(name: str, left, right, group_sizes, dtype, **arguments):
    """Within a rule of our own: its kernels mix dtypes, which users may have forbidden, and do not say that results
    vary over mesh axes: JAX would differentiate them as if those were the same everywhere."""
    import tokamax

    with jax.numpy_dtype_promotion("standard"):
        out = getattr(tokamax, name)(left, right, group_sizes, preferred_element_type=dtype, **arguments)
    out = vary(out, varying_axes(left))
    if out.ndim == 3:
        return out
    # Rows beyond all groups are left as memory was. The gradient in kernels multiplies them by zeros, and a NaN by zero
    # is NaN.
    is_of_group = jnp.arange(out.shape[0], dtype=group_sizes.dtype) < group_sizes.sum()
    return jnp.where(is_of_group[:, None], out, jnp.zeros((), out.dtype))
