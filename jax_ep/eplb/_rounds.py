"""Moves slots of a sharded array from rank to rank, in rounds of bounded size.

The host only counts slots per pair of ranks; which row goes where in a round, devices find out from those counts. So a
program is compiled once for a shape, whatever moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep._words import as_words, from_words
from jax_ep.eplb import _rows
from jax_ep.eplb._movers import Mover, filled_shape, named_sharding, placed
from jax_ep.eplb._plan import Moves, MoveTables, TransferPlan
from jax_ep.eplb._transports import Transport


def rounds_of(rows: np.ndarray, num_rounds: int):
    """Of each pair's rows `[R, R]`, the first of each round and how many: every round gets about as many."""
    ends = [rows.astype(np.int64) * i // num_rounds for i in range(num_rounds + 1)]
    for first, end in zip(ends, ends[1:], strict=False):
        yield first.astype(np.int32), (end - first).astype(np.int32)


class RoundsMover(Mover):
    """Takes what stays, moves slots over one mesh axis by a transport, and copies those that are wanted twice."""

    def __init__(self, axis_name: str, transport: Transport):
        self.name, self.row_bytes = transport.name, transport.row_bytes
        self._axis_name, self._transport = axis_name, transport
        self._taken = functools.lru_cache(maxsize=None)(self._build_taken)
        self._round = functools.lru_cache(maxsize=None)(self._build_round)

    def fill(self, source: jax.Array, plan: TransferPlan, num_slot_dims: int) -> tuple[jax.Array, int]:
        sharding = named_sharding(source)
        words = not _rows.is_scattered_bitwise(source.dtype, sharding.mesh.devices.flat[0].platform)
        # Numpy arrays are the same on all processes, which is what jit takes for replicated.
        dest = self._taken(sharding, num_slot_dims, words)(source, plan.local_source)
        dest, num_rounds = self._move(source, dest, plan.moves, num_slot_dims)
        if plan.copies is not None:
            dest = self._taken(sharding, num_slot_dims, False)(dest, plan.copies)
        return _cast(sharding, source.dtype)(dest) if words else dest, num_rounds

    def _move(self, source: jax.Array, dest: jax.Array, moves: Moves, num_slot_dims: int) -> tuple[jax.Array, int]:
        """`dest`, which is donated, with slots of `source`; and the number of rounds. Slots of both have one size."""
        if not len(moves.src_rank):
            return dest, 0
        transport, sharding = self._transport, named_sharding(dest)
        per_slot = _rows.rows_per_slot(_rows.slot_size(source, num_slot_dims), source.dtype, self.row_bytes)
        rows = moves.counts(transport.num_ranks) * per_slot
        layout, num_rounds = transport.layout(rows)
        step = self._round(sharding, layout, per_slot, num_slot_dims)
        tables = [placed(table, sharding.mesh) for table in MoveTables.of(moves, transport.num_ranks)]
        for first, count in rounds_of(rows, num_rounds):
            dest = step(dest, source, tables, first, count)
        return dest, num_rounds

    def _build_taken(self, sharding: NamedSharding, num_slot_dims: int, words: bool) -> Callable:
        """`(array, index [R, D]) -> ` each rank's slots by its row of `index`, zeros for -1."""

        def take(array, index):
            slots = _rows.slots_view(array, num_slot_dims)
            out = _rows.take_slots(slots, index[jax.lax.axis_index(self._axis_name)])
            shape = filled_shape(array.shape, index.shape[1], num_slot_dims)
            return (as_words(out) if words else out).reshape(shape)

        return _mapped(sharding, take, ("array", "small"), "array")

    def _build_round(self, sharding: NamedSharding, layout, per_slot: int, num_slot_dims: int) -> Callable:
        """`(dest, source, tables, first, count) -> dest`, one round."""
        transport, axis = self._transport, self._axis_name
        row_bytes = transport.row_bytes

        def send(source, tables, first, count):
            send_slots, send_begin = tables[:2]
            me = jax.lax.axis_index(axis)
            peer, i, is_used = transport.positions(layout, me, count[me], True)
            slot, row = _slot_and_row(send_slots[me], send_begin[me], first[me], peer, i, per_slot)
            slots = _rows.slots_view(source, num_slot_dims)
            return _rows.gather_rows(slots, jnp.where(is_used, slot, 0), row, row_bytes)

        def receive(dest, rows, tables, first, count):
            recv_slots, recv_begin = tables[2:]
            me = jax.lax.axis_index(axis)
            peer, i, is_used = transport.positions(layout, me, count[:, me], False)
            slot, row = _slot_and_row(recv_slots[me], recv_begin[me], first[:, me], peer, i, per_slot)
            slots = _rows.slots_view(dest, num_slot_dims)
            slot = jnp.where(is_used, slot, slots.shape[0])
            return _rows.scatter_rows(slots, slot, row, rows, row_bytes).reshape(dest.shape)

        def whole(dest, source, tables, first, count):
            rows = send(source, tables, first, count)
            return receive(dest, transport.exchange(layout, rows, count), tables, first, count)

        mapped = functools.partial(_mapped, sharding)
        at_axis = NamedSharding(sharding.mesh, _rows_spec(sharding.spec, axis))
        if not transport.is_staged:
            return mapped(whole, ("array", "array", "small", "small", "small"), "array", donate_argnums=0)
        gather = mapped(send, ("array", "small", "small", "small"), "rows", rows=at_axis.spec)
        scatter = mapped(
            receive, ("array", "rows", "small", "small", "small"), "array", rows=at_axis.spec, donate_argnums=0
        )

        def staged(dest, source, tables, first, count):
            rows = gather(source, tables, first, count)
            return scatter(dest, transport.exchange(layout, rows, count), tables, first, count)

        return staged


def _slot_and_row(slots, begin, first, peer, i, per_slot: int):
    row = first[peer] + i
    entry = jnp.clip(begin[peer] + row // per_slot, 0, slots.shape[0] - 1)
    return slots[entry], row % per_slot


def _rows_spec(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """Of rows on devices: split over all axes of the array's own, the moving one first."""
    names: list[Any] = [
        name for entry in spec if entry is not None for name in ([entry] if isinstance(entry, str) else entry)
    ]
    return PartitionSpec((axis, *(name for name in names if name != axis)))


def _mapped(sharding: NamedSharding, fn: Callable, ins: tuple[str, ...], out: str, rows=None, **options) -> Callable:
    kinds = dict(array=sharding.spec, rows=rows, small=PartitionSpec())
    specs = tuple(kinds[kind] for kind in ins)
    return jax.jit(jax.shard_map(fn, mesh=sharding.mesh, in_specs=specs, out_specs=kinds[out]), **options)


@functools.lru_cache(maxsize=256)
def _cast(sharding: NamedSharding, dtype: jnp.dtype):
    return jax.jit(lambda words: from_words(words, dtype), out_shardings=sharding)
