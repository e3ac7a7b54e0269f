"""Dispatch: tokens travel to the ranks of their experts, once per rank, and are expanded there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep import _ffi, _quant, _reference
from jax_ep.types import QuantConfig


@jax.named_scope("jax_ep.dispatch_start")
def start(spec, x, weights, topk_ids, routing, quant: QuantConfig | None):
    """Sends what `dispatch` by `topk_ids`, or without them `dispatch_cached` along `routing`, is to receive.

    Returns the ticket, int32 [2], that makes these the receiving half, given the same operands. The reference has none:
    who receives does all of it.
    """
    return None if spec.is_reference else _ffi.dispatch_start(spec, x, weights, topk_ids, routing, quant)


@jax.named_scope("jax_ep.dispatch")
def dispatch(spec, x, weights, topk_ids, quant: QuantConfig | None, fill: bool, ticket=None):
    """Routes by `topk_ids` int32 [T, K], and moves `x` [T, H] and `weights` float32 [T, K] or None.

    Returns what the ranks agreed on, all integers: (routing, num_tokens_per_expert [L], offsets [G + 1],
    num_dropped [], recv_topk_ids [C, K] or None); and what `dispatch_cached` along that routing returns.
    """
    if spec.is_reference:
        routed = _named(_reference.route(spec, topk_ids))
        received = _reference_received(spec, x, weights, routed[0], quant)
    else:
        routed, received = _move(spec, True, fill, x, weights, topk_ids, quant, ticket)
    return routed, _guarded(*received)


@jax.named_scope("jax_ep.dispatch_cached")
def dispatch_cached(spec, x, weights, routing, quant: QuantConfig | None, fill: bool, ticket=None):
    """Moves `x` [T, H], and `weights` float32 [T, K] or None, along `routing`.

    Returns rows [C, H]; the weights beside them, [C], or [C, K] for RANK_MAJOR, None without weights; and with `quant`
    their scales [C, H / block], and the array [C, H] that the gradient of x returns by, None if x came quantised.
    Slots of EXPERT_MAJOR without a token are zero with `fill`, or if x or weights is differentiated.
    """
    if spec.is_reference:
        received = _reference_received(spec, x, weights, routing, quant)
    else:
        _, received = _move(spec, False, fill, x, weights, routing, quant, ticket)
    return _guarded(*received)


def _named(arrays):
    """For a policy of `jax.checkpoint` that keeps what an op returned: residuals bear the name as well."""
    return jax.tree.map(lambda array: checkpoint_name(array, "jax_ep.dispatch"), arrays)


def _reference_received(spec, x, weights, routing, quant):
    *received, straight_through = _reference.dispatch_cached(spec, x, weights, routing, quant)
    return *_named(received), straight_through


def _guarded(tokens, row_weights, scales, straight_through):
    if scales is not None:
        tokens, scales = _quant.guard(tokens, scales, straight_through)
    return tokens, row_weights, scales, straight_through


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _move(spec, is_fresh: bool, fill: bool, x, weights, by, quant: QuantConfig | None, ticket):
    """Moves `x` along the routing of topk_ids `by` or, not `is_fresh`, along tables `by`."""
    return _moved(spec, is_fresh, fill, x, weights, by, quant, ticket)


def _moved(spec, is_fresh, fill, x, weights, by, quant, ticket):
    if is_fresh:
        routed, received = _ffi.dispatch(spec, x, weights, by, quant, fill=fill, ticket=ticket)
    else:
        routed, received = None, _ffi.dispatch_cached(spec, x, weights, by, quant, fill=fill, ticket=ticket)
    routed, received = _named((routed, received))
    straight_through = _no_rows(spec, x) if quant is not None and quant.scales is None else None
    return routed, (*received, straight_through)


def _no_rows(spec, like):
    return _ffi.vary(jnp.zeros((spec.shape.capacity, spec.shape.hidden_size), spec.dtype), _ffi.varying_axes(like))


def _forward(spec, is_fresh, fill, x, weights, by, quant, ticket):
    """With zeros in slots that hold no token, since sums over rows meet them in the backward pass."""
    del fill
    routed, received = _moved(spec, is_fresh, True, x, weights, by, quant, ticket)
    return (routed, received), (routed[0] if is_fresh else by, x.shape[0])


@jax.named_scope("jax_ep.dispatch_backward")
def _backward(spec, is_fresh, fill, residuals, gradients):
    """An unweighted combine of the rows' gradients, in one piece; each weight's gradient returns to its (token, k)."""
    del is_fresh, fill
    routing, num_tokens = residuals
    _, (rows, row_weights, scales, straight_through) = gradients
    came_quantised = scales is not None and straight_through is None
    if came_quantised:  # then only the weights have a gradient
        rows = _no_rows(spec, row_weights)
    elif scales is not None:
        rows = straight_through
    x, weights = _ffi.combine(spec, rows, None, row_weights, routing, num_tokens)
    return None if came_quantised else x, weights, None, None, None


_move.defvjp(_forward, _backward)
