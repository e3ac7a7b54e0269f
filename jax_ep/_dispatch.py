"""Dispatch: tokens travel to the ranks of their experts, once per rank, and are expanded there."""

from __future__ import annotations

import functools

import jax

from jax_ep import _ffi, _reference


def dispatch(spec, x, weights, topk_ids):
    """Routes by `topk_ids` int32 [T, K], and moves `x` [T, H] and `weights` float32 [T, K] or None.

    Returns what the ranks agreed on, all integers: (routing, num_tokens_per_expert [L], offsets [G + 1],
    num_dropped [], recv_topk_ids [C, K] or None); and what `dispatch_cached` along that routing returns.
    """
    if spec.is_reference:
        return _reference.dispatch(spec, x, weights, topk_ids)
    return _dispatch(spec, x, weights, topk_ids)


def dispatch_cached(spec, x, weights, routing):
    """Moves `x` [T, H], and `weights` float32 [T, K] or None, along `routing`.

    Returns rows [C, H] and the weights beside them: [C] for FLAT, [C, K] for RANK_MAJOR, None without weights.
    """
    if spec.is_reference:
        return _reference.dispatch_cached(spec, x, weights, routing)
    return _dispatch_cached(spec, x, weights, routing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(spec, x, weights, topk_ids):
    return _ffi.dispatch(spec, x, weights, topk_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch_cached(spec, x, weights, routing):
    return _ffi.dispatch_cached(spec, x, weights, routing)


def _forward(spec, x, weights, topk_ids):
    routed, received = _ffi.dispatch(spec, x, weights, topk_ids)
    return (routed, received), (routed[0], x.shape[0])


def _forward_cached(spec, x, weights, routing):
    return _ffi.dispatch_cached(spec, x, weights, routing), (routing, x.shape[0])


def _backward(spec, residuals, gradients):
    _, received = gradients
    return _backward_cached(spec, residuals, received)


def _backward_cached(spec, residuals, gradients):
    """An unweighted combine of the rows' gradients; each weight's gradient returns to its (token, k)."""
    routing, num_tokens = residuals
    rows, row_weights = gradients
    x, weights = _ffi.combine(spec, rows, None, row_weights, routing, num_tokens)
    return x, weights, None


_dispatch.defvjp(_forward, _backward)
_dispatch_cached.defvjp(_forward_cached, _backward_cached)
