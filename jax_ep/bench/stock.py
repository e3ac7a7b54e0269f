"""The whole job in stock JAX: tokens, expert ids and weights in, rows grouped by expert out, and back with weights.

Four pipelines from two choices. What a *slot* of the exchange carries: a copy per (token, k), or one token per
(token, rank), which is expanded where it arrives and summed there before it returns. And how slots travel: by
`lax.all_to_all`, padded to a capacity per pair of ranks, or by `lax.ragged_all_to_all`, in exact sizes.

Rows are only ever gathered, also in the backward pass, and sums are kept in float32: scattering rows is slower. Orders
come from one sort of (group, position) packed into one integer, which XLA hands to a radix sort on GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_ep import _ffi


class Pairing(NamedTuple):
    """Which source each row is a copy of, and where each source's copies are; -1 where there is none.

    Every source n has U places for copies, numbered n * U + u.
    """

    places: jax.Array  # [M], of each row
    rows: jax.Array  # [N, U], of each source

    @property
    def sources(self) -> jax.Array:
        return jnp.where(self.places >= 0, self.places // self.rows.shape[1], -1)


class Plan(NamedTuple):
    """The way of one routing's tokens, there and back."""

    outgoing: Pairing  # my tokens -> slots that I send
    arriving: Pairing  # slots that I receive -> rows by expert
    sizes: jax.Array | None  # [R, R], slots from each rank to each rank, where those are exact
    num_tokens_per_expert: jax.Array  # [L]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Call its methods inside `jax.shard_map`. Sizes have to hold what the routing needs: nothing is checked."""

    axis_name: str
    num_ranks: int
    num_local_experts: int
    capacity: int  # rows of a rank's dispatch output
    ragged: bool
    per_rank: bool  # a slot per (token, rank) instead of per (token, k)
    slots_sent: int  # dense: R times as many as one rank may send to one rank
    slots_received: int

    @property
    def name(self) -> str:
        return f"{'ragged' if self.ragged else 'dense'}, a slot per (token, {'rank' if self.per_rank else 'k'})"

    def dispatch(self, x, topk_ids, weights):
        """Rows by expert [C, H], the plan, and the weights as `combine` wants them."""
        plan, weights = self.plan(topk_ids, weights)
        slots = exchange(self, False, copy_rows(x, plan.outgoing), plan.sizes)
        return copy_rows(slots, plan.arriving), plan, weights

    def combine(self, y, plan: Plan, weights):
        """Sums of `y` [C, H] for my tokens [T, H]."""
        there, here = (weights, None) if self.per_rank else (None, weights)
        slots = exchange(self, True, sum_rows(y, there, plan.arriving), plan.sizes)
        return sum_rows(slots, here, plan.outgoing)

    def plan(self, topk_ids, weights) -> tuple[Plan, jax.Array]:
        """Also the weights: where sums are made by the expert's rank, those that arrived there."""
        dest, local_ids = self._slots_wanted(topk_ids)
        order = grouped(dest, self.num_ranks)
        sizes = lax.all_gather(order.counts, self.axis_name) if self.ragged else None
        # Slots for one rank are contiguous; dense ones begin at multiples.
        every = self.slots_sent // self.num_ranks
        bases = order.starts if self.ragged else jnp.arange(self.num_ranks, dtype=jnp.int32) * every
        outgoing = paired(order, dest.shape, bases, self.slots_sent)
        labels = take(local_ids, outgoing.places, -1)
        if self.per_rank:
            labels = jnp.concatenate([labels.astype(jnp.float32), take(weights, outgoing.sources, 0.0)], axis=1)
        labels = exchange(self, False, labels, sizes)
        if self.per_rank:
            labels, weights = jnp.split(labels, 2, axis=1)
        arrived_ids = self._only_arrived(labels.astype(jnp.int32), sizes)
        order = grouped(jnp.where(arrived_ids >= 0, arrived_ids, self.num_local_experts), self.num_local_experts)
        arriving = paired(order, arrived_ids.shape, order.starts, self.capacity)
        return Plan(outgoing, arriving, sizes, order.counts), weights

    def _slots_wanted(self, topk_ids):
        """Where each slot goes [T, U], R if nowhere; and the local expert ids it carries [T * U, V], -1 if none."""
        ranks = jnp.where(topk_ids >= 0, topk_ids // self.num_local_experts, self.num_ranks)
        local_ids = jnp.where(topk_ids >= 0, topk_ids % self.num_local_experts, -1)
        if not self.per_rank:
            return ranks, local_ids.reshape(-1, 1)
        all_ranks = jnp.arange(self.num_ranks, dtype=jnp.int32)
        goes_to = ranks[:, None, :] == all_ranks[:, None]  # [T, R, K]
        dest = jnp.where(goes_to.any(2), all_ranks, self.num_ranks)
        return dest, jnp.where(goes_to, local_ids[:, None, :], -1).reshape(dest.size, -1)

    def _only_arrived(self, ids, sizes):
        """A ragged exchange leaves what lies behind the last slot as it was."""
        if not self.ragged:
            return ids
        arrived = sizes[:, lax.axis_index(self.axis_name)].sum()
        return jnp.where(jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None] < arrived, ids, -1)


# Orders.


class Order(NamedTuple):
    """Positions by group, each group's in order; those of the group behind the last one come last."""

    positions: jax.Array
    groups: jax.Array  # of each position
    counts: jax.Array  # [G]
    starts: jax.Array  # [G]


def grouped(groups, num_groups: int) -> Order:
    groups = groups.reshape(-1)
    n = groups.size
    iota = jnp.arange(n, dtype=jnp.int32)
    if (num_groups + 1) * n < 2**31:
        keys = lax.sort(groups * n + iota)
        positions, in_order = keys % n, keys // n
    else:
        in_order, positions = lax.sort((groups, iota), num_keys=1, is_stable=True)
    counts = (groups[:, None] == jnp.arange(num_groups, dtype=jnp.int32)).sum(0, dtype=jnp.int32)
    return Order(positions, in_order, counts, jnp.cumsum(counts, dtype=jnp.int32) - counts)


def paired(order: Order, shape: tuple[int, int], bases, num_rows: int) -> Pairing:
    """Gives the i-th position of group g the row bases[g] + i."""
    num_groups = bases.shape[0]
    group = jnp.minimum(order.groups, num_groups - 1)
    rows = jnp.arange(order.positions.size, dtype=jnp.int32) + (bases - order.starts)[group]
    rows = jnp.where((order.groups < num_groups) & (rows < num_rows), rows, -1)
    # Indices are promised to be unique, so those without a row each miss at one of their own.
    targets = jnp.where(rows >= 0, rows, num_rows + jnp.arange(rows.size, dtype=jnp.int32))
    places = jnp.full((num_rows,), -1, jnp.int32).at[targets].set(order.positions, unique_indices=True, mode="drop")
    of_source = jnp.zeros_like(rows).at[order.positions].set(rows, unique_indices=True)
    return Pairing(places, of_source.reshape(shape))


def take(rows, indices, fill):
    """Rows by index, `fill` for -1."""
    found = jnp.take(rows, jnp.maximum(indices, 0), axis=0, mode="clip")
    present = (indices >= 0).reshape(indices.shape + (1,) * (rows.ndim - 1))
    return jnp.where(present, found, jnp.asarray(fill, rows.dtype))


# Moving rows: each is the other's gradient, and both gather.


@jax.custom_vjp
def copy_rows(sources, pairing: Pairing):
    """[N, H] -> [M, H]."""
    return take(sources, pairing.sources, 0)


def _copy_rows_backward(pairing, gradients):
    return sum_rows(gradients, None, pairing), None


copy_rows.defvjp(lambda sources, pairing: (copy_rows(sources, pairing), pairing), _copy_rows_backward)


@jax.custom_vjp
def sum_rows(rows, weights, pairing: Pairing):
    """[M, H], and weights [N, U] or None -> [N, H]."""
    total = jnp.zeros((pairing.rows.shape[0], rows.shape[1]), jnp.float32)
    for u in range(pairing.rows.shape[1]):
        values = take(rows, pairing.rows[:, u], 0).astype(jnp.float32)
        total += values if weights is None else values * weights[:, u, None]
    return total.astype(rows.dtype)


def _sum_rows_forward(rows, weights, pairing):
    # Only the weights' gradient needs the rows.
    return sum_rows(rows, weights, pairing), (None if weights is None else (rows, weights), pairing)


def _sum_rows_backward(residuals, gradients):
    weighted, pairing = residuals
    copies = copy_rows(gradients, pairing)
    if weighted is None:
        return copies, None, None
    rows, weights = weighted
    row_weights = take(weights.reshape(-1), pairing.places, 0)
    dots = jnp.sum(copies.astype(jnp.float32) * rows.astype(jnp.float32), axis=1)
    row_gradients = (copies.astype(jnp.float32) * row_weights[:, None]).astype(rows.dtype)
    return row_gradients, take(dots, pairing.rows, 0), None


sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


# Exchanges: there and back are each other's gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def exchange(pipeline: Pipeline, back: bool, slots, sizes):
    """Slots [S, ...] to the ranks that they are for, or back to where they came from."""
    axis = pipeline.axis_name
    if not pipeline.ragged:
        by_rank = slots.reshape(pipeline.num_ranks, -1, *slots.shape[1:])
        return lax.all_to_all(by_rank, axis, split_axis=0, concat_axis=0).reshape(slots.shape)
    me = lax.axis_index(axis)
    # Where the slots from s to d begin, in the buffer of s and in that of d.
    at_source = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes
    at_destination = jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
    sent = at_source[me], sizes[me], at_destination[me], sizes[:, me]
    returned = at_destination[:, me], sizes[:, me], at_source[:, me], sizes[me]
    num_slots = pipeline.slots_sent if back else pipeline.slots_received
    empty = _ffi.vary(jnp.zeros((num_slots, *slots.shape[1:]), slots.dtype), _ffi.varying_axes(slots))
    return lax.ragged_all_to_all(slots, empty, *(returned if back else sent), axis_name=axis)


def _exchange_forward(pipeline, back, slots, sizes):
    return exchange(pipeline, back, slots, sizes), sizes


def _exchange_backward(pipeline, back, sizes, gradients):
    return exchange(pipeline, not back, gradients, sizes), None


exchange.defvjp(_exchange_forward, _exchange_backward)
