"""The ops in pure JAX over stock collectives: an implementation for every platform, the baseline of the
benchmarks, and the oracle of the tests. JAX differentiates it; no rule here is ours.

Tokens are gathered whole (`all_gather`): with a worst-case capacity per pair of ranks, a dense `all_to_all`
would move as many bytes and need a gather besides. Sums return by `all_to_all`, one row per (token, rank).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_ep import _quant
from jax_ep._words import as_words, from_words
from jax_ep.types import DispatchLayout, ErrorCode


def route(spec, topk_ids):
    """The integers of `_dispatch.dispatch`. Here `routing` is a dict: `rows` [R, T, M], the output row of each
    (source, token, k), -1 where there is none; `sources` [C], the (source, token) of each output row, -1 for
    padding; `poison` [], 1, or NaN if the step is to be poisoned."""
    shape = spec.shape
    rank = lax.axis_index(spec.axis_name)
    all_ids = lax.all_gather(topk_ids, spec.axis_name)  # [R, T, K]
    is_expert = (all_ids >= 0) & (all_ids < shape.num_experts)
    ranks = jnp.where(is_expert, all_ids // shape.num_local_experts, -1)
    local_ids = jnp.where(ranks == rank, all_ids - rank * shape.num_local_experts, -1)

    if shape.layout is DispatchLayout.RANK_MAJOR:
        source_ranks = jnp.arange(shape.num_ranks, dtype=jnp.int32)[:, None, None]
        groups = jnp.where((local_ids >= 0).any(-1, keepdims=True), source_ranks, -1)
    else:
        groups = local_ids
    rows, offsets = _place(groups, shape)
    kept = (rows >= 0) & (rows < _end_of_group(shape, groups))
    num_dropped = jnp.sum((rows >= 0) & ~kept, dtype=jnp.int32)
    rows = jnp.where(kept, rows, -1)
    offsets = jnp.minimum(offsets, shape.capacity)

    flat = jnp.where(kept, rows, shape.capacity).reshape(-1)
    positions = jnp.arange(rows.shape[0] * rows.shape[1], dtype=jnp.int32)
    sources = jnp.full((shape.capacity,), -1, jnp.int32).at[flat].set(jnp.repeat(positions, rows.shape[2]), mode="drop")
    kept_ids = jnp.where(kept, local_ids, -1)
    num_tokens_per_expert = (
        jnp.zeros((shape.num_local_experts,), jnp.int32)
        .at[jnp.where(kept_ids >= 0, kept_ids, shape.num_local_experts)]
        .add(1, mode="drop")
    )
    recv_topk_ids = None
    if shape.layout is DispatchLayout.RANK_MAJOR:
        recv_topk_ids = jnp.where((sources >= 0)[:, None], _take(local_ids.reshape(-1, shape.topk), sources), -1)
    routing = dict(rows=rows, sources=sources, poison=_poison(spec, all_ids, is_expert, ranks))
    return routing, num_tokens_per_expert, offsets, num_dropped, recv_topk_ids


def _alignment(shape) -> int:
    return 1 if shape.layout is DispatchLayout.RANK_MAJOR else shape.expert_alignment


def _end_of_group(shape, groups):
    """The row that the rows of each group must stay below."""
    if shape.layout is DispatchLayout.EXPERT_MAJOR:
        return (groups + 1) * shape.slots_per_expert
    return shape.capacity


def _place(groups, shape):
    """Rows in order of (group, position) for each entry of `groups`, -1 where that is -1; and the groups'
    first rows. As if capacity had no end."""
    num_groups, alignment = shape.num_row_groups, _alignment(shape)
    flat = jnp.where(groups >= 0, groups, num_groups).reshape(-1)
    counts = jnp.zeros((num_groups + 1,), jnp.int32).at[flat].add(1)
    padded = -(-counts[:-1] // alignment) * alignment
    if shape.layout is DispatchLayout.EXPERT_MAJOR:
        padded = jnp.full_like(padded, shape.slots_per_expert)
    offsets = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(padded, dtype=jnp.int32)])
    # A stable sort puts each group's entries together, in order.
    order = jnp.argsort(flat, stable=True)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    sorted_groups = flat[order]
    places = jnp.arange(flat.size, dtype=jnp.int32) - starts[sorted_groups] + offsets[sorted_groups]
    rows = jnp.zeros_like(flat).at[order].set(jnp.where(sorted_groups < num_groups, places, -1))
    return rows.reshape(groups.shape), offsets


def _poison(spec, all_ids, is_expert, ranks):
    """NaN on all ranks if any rank's routing cannot be honoured, else 1; also tells the communicator."""
    shape = spec.shape
    bad_ids = jnp.sum(~is_expert & (all_ids != -1), axis=(1, 2), dtype=jnp.int32)  # [R]
    if shape.layout is DispatchLayout.RANK_MAJOR:
        hits = (ranks[..., None] == jnp.arange(shape.num_ranks, dtype=jnp.int32)).any(2)  # [R, T, R]
        needed, limit = hits.sum((0, 1), dtype=jnp.int32), shape.capacity
    else:
        experts = (
            jnp.zeros((shape.num_experts,), jnp.int32)
            .at[jnp.where(is_expert, all_ids, shape.num_experts)]
            .add(1, mode="drop")
        )
        experts = experts.reshape(shape.num_ranks, -1)
        if shape.layout is DispatchLayout.EXPERT_MAJOR:
            needed, limit = experts.max(1), shape.slots_per_expert
        else:
            alignment = shape.expert_alignment
            needed, limit = (-(-experts // alignment) * alignment).sum(1, dtype=jnp.int32), shape.capacity
    overflows = (needed > limit) & (not spec.drop_overflow)
    any_bad = (bad_ids > 0).any()
    failed = any_bad | overflows.any()
    code = jnp.where(any_bad, int(ErrorCode.BAD_EXPERT_ID), int(ErrorCode.OVERFLOW))
    where = jnp.where(any_bad, jnp.argmax(bad_ids > 0), jnp.argmax(overflows))
    got = jnp.where(any_bad, bad_ids[where], needed[where])
    lax.cond(failed, lambda: jax.debug.callback(spec.report_error, code, where, got), lambda: None)
    return jnp.where(failed, jnp.nan, 1.0).astype(jnp.float32)


def _take(rows, indices):
    """Rows by index, anything for -1: callers mask."""
    return jnp.take(rows, jnp.maximum(indices, 0), axis=0)


def dispatch_cached(spec, x, weights, routing, quant=None):
    """See `_dispatch.dispatch_cached`."""
    row_weights = None if weights is None else _dispatch_weights(spec, weights, routing)
    if quant is None:
        return _dispatch_rows(spec, x, routing), row_weights, None, None
    elements, scales = (x, quant.scales) if quant.scales is not None else _quant.quantize(lax.stop_gradient(x), quant)
    # As bytes, which collectives of all versions move. A poisoned step has NaN for scales: not all elements know one.
    tokens = _dispatch_rows(spec, lax.bitcast_convert_type(elements, jnp.uint8), routing)
    bits = jnp.uint8 if jnp.dtype(quant.scale_dtype).itemsize == 1 else jnp.uint32
    scale_bits = _dispatch_rows(spec, lax.bitcast_convert_type(scales, bits), routing)
    nan = lax.bitcast_convert_type(jnp.asarray(jnp.nan, jnp.dtype(quant.scale_dtype)), bits)
    scale_bits = jnp.where(jnp.isnan(routing["poison"]), nan, scale_bits)
    # What the rows stand for, by which their gradient returns.
    straight_through = _dispatch_rows(spec, x, routing) if quant.scales is None else None
    return (
        lax.bitcast_convert_type(tokens, jnp.dtype(quant.dtype)),
        row_weights,
        lax.bitcast_convert_type(scale_bits, jnp.dtype(quant.scale_dtype)),
        straight_through,
    )


def _dispatch_rows(spec, x, routing):
    sources = routing["sources"]
    all_x = lax.all_gather(x, spec.axis_name).reshape(-1, x.shape[-1])
    rows = jnp.where((sources >= 0)[:, None], _take(all_x, sources), jnp.zeros((), x.dtype))
    return rows * routing["poison"].astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else rows


def _dispatch_weights(spec, weights, routing):
    shape, sources, poison = spec.shape, routing["sources"], routing["poison"]
    all_weights = lax.all_gather(weights, spec.axis_name).reshape(-1, shape.topk)
    if shape.layout is DispatchLayout.RANK_MAJOR:
        return jnp.where((sources >= 0)[:, None], _take(all_weights, sources), 0) * poison
    rows = routing["rows"].reshape(-1)
    row_weights = (
        jnp.zeros((shape.capacity,), weights.dtype)
        .at[jnp.where(rows >= 0, rows, shape.capacity)]
        .set(all_weights.reshape(-1), mode="drop")
    )
    return row_weights * poison


def combine(spec, y, row_weights, routing, num_tokens: int):
    """See `_combine.combine`."""
    shape, rows, poison = spec.shape, routing["rows"], routing["poison"]
    sum_dtype = jnp.float64 if y.dtype == jnp.float64 else jnp.float32
    partial = jnp.zeros((shape.num_ranks * num_tokens, shape.hidden_size), sum_dtype)
    for k in range(shape.rows_per_token):
        indices = rows[:, :, k].reshape(-1)
        values = _take(y, indices).astype(sum_dtype)
        if row_weights is not None:
            values *= _take(row_weights, indices)[:, None].astype(sum_dtype)
        partial += jnp.where((indices >= 0)[:, None], values, 0)
    partial = partial.astype(y.dtype).reshape(shape.num_ranks, num_tokens, shape.hidden_size)
    # [R, T, H]: from each rank, what it sums for my tokens.
    returned = lax.all_to_all(partial, spec.axis_name, split_axis=0, concat_axis=0)
    total = jnp.zeros((num_tokens, shape.hidden_size), sum_dtype)
    for rank in range(shape.num_ranks):
        total += returned[rank].astype(sum_dtype)
    return (total * poison.astype(sum_dtype)).astype(y.dtype)


def transfer(spec, source, tables):
    """`_transfer.transfer`, by the `TransferTables` of this rank."""
    axis, rank = spec.axis_name, lax.axis_index(spec.axis_name)
    num_sources, everyones = source.shape[0], lax.all_gather(tables, axis)
    # Where each slot is filled from, counted through all ranks' slots.
    own = jnp.where(tables.source >= 0, rank * num_sources + tables.source, -1)
    arrival = jnp.arange(tables.recv_slots.shape[0], dtype=jnp.int32)
    src = jnp.searchsorted(tables.recv_begin, arrival, side="right", method="compare_all").astype(jnp.int32) - 1
    src = jnp.minimum(src, spec.shape.num_ranks - 1)
    sent = everyones.send_begin[src, rank] + arrival - tables.recv_begin[src]
    slot = everyones.send_slots[src, jnp.minimum(sent, arrival.shape[0] - 1)]
    arrives = arrival < tables.recv_begin[-1]
    first = own.at[jnp.where(arrives, tables.recv_slots, own.shape[0])].set(src * num_sources + slot, mode="drop")
    origin = lax.fori_loop(0, own.shape[0], lambda _, origin: _passed_on(origin, tables.next), first)
    slots = lax.all_gather(as_words(source), axis, tiled=True)
    filled = jnp.where((origin >= 0)[:, None], slots[jnp.maximum(origin, 0)], jnp.zeros((), slots.dtype))
    return from_words(filled, source.dtype)


def _passed_on(origin, following):
    """Each slot's origin, and that of the slot whose `following` it is."""
    return origin.at[jnp.where(following >= 0, following, origin.shape[0])].set(origin, mode="drop")
