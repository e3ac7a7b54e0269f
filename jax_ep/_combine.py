"""Combine: the rows of a token are summed on each expert rank, and those sums at the token's source."""

from __future__ import annotations

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_ep import _ffi, _reference


@jax.named_scope("jax_ep.combine_start")
def start(spec, y, row_weights, routing, num_tokens: int):
    """Sends what `combine` is to receive, and returns its ticket, see `_dispatch.start`."""
    return None if spec.is_reference else _ffi.combine_start(spec, y, row_weights, routing, num_tokens)


@jax.named_scope("jax_ep.combine")
def combine(spec, y, row_weights, routing, num_tokens: int, ticket=None):
    """Sums `y` [C, H], weighted by `row_weights` float32 [C] unless None, into [T, H].

    Sums are kept in float32 (float64 for float64 rows), each rank's is rounded once to the dtype of `y` to
    cross the link, and the ranks are added in order: the result is bitwise the same from run to run.
    """
    if spec.is_reference:
        out = _reference.combine(spec, y, row_weights, routing, num_tokens)
    else:
        out = _combine(spec, num_tokens, y, row_weights, routing, ticket)
    return checkpoint_name(out, "jax_ep.combine")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combine(spec, num_tokens, y, row_weights, routing, ticket):
    return _ffi.combine(spec, y, row_weights, None, routing, num_tokens, ticket)[0]


def _forward(spec, num_tokens, y, row_weights, routing, ticket):
    # Only the weights' gradient needs y.
    residuals = (routing, None if row_weights is None else (y, row_weights))
    return _combine(spec, num_tokens, y, row_weights, routing, ticket), residuals


@jax.named_scope("jax_ep.combine_backward")
def _backward(spec, num_tokens, residuals, gradient):
    """A cached dispatch of the gradient, in one piece, scaled by each row's weight on arrival."""
    del num_tokens
    routing, weighted = residuals
    if weighted is None:
        return _ffi.dispatch_cached(spec, gradient, None, routing)[0], None, None, None
    y_gradient, weight_gradient = _ffi.dispatch_scaled(spec, gradient, routing, *weighted)
    return y_gradient, weight_gradient, None, None


_combine.defvjp(_forward, _backward)
