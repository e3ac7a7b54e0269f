"""Dispatch: tokens travel to the ranks of their experts, once per rank, and are expanded there."""

from __future__ import annotations

import functools

import jax

from jax_ep import _ffi, _reference


def dispatch(spec, x, weights, routing):
    """Moves `x` [T, H], and `weights` float32 [T, K] or None, along `routing`.

    Returns rows [C, H] and the weights beside them: [C] for FLAT, [C, K] for RANK_MAJOR, None without weights.
    """
    if spec.is_reference:
        return _reference.dispatch(spec, x, weights, routing)
    return _dispatch(spec, x, weights, routing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(spec, x, weights, routing):
    return _ffi.dispatch(spec, x, weights, routing)


def _forward(spec, x, weights, routing):
    return _ffi.dispatch(spec, x, weights, routing), (routing, x.shape[0])


def _backward(spec, residuals, gradients):
    """An unweighted combine of the rows' gradients; each weight's gradient returns to its (token, k)."""
    routing, num_tokens = residuals
    rows, row_weights = gradients
    x, weights = _ffi.combine(spec, rows, None, row_weights, routing, num_tokens)
    return x, weights, None


_dispatch.defvjp(_forward, _backward)
