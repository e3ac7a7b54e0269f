"""Moves slots of a sharded array from rank to rank, in rounds of bounded size.

The host only counts slots per pair of ranks; which row goes where in a round, devices find out from those counts. So a
program is compiled once for a shape, whatever moves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep.eplb import _rows
from jax_ep.eplb._transports import Transport, power_of_two

# In tables of which slots move: fewer are padded, so that a few more do not ask for another program.
_LEAST_SLOTS = 256


def named_sharding(array: jax.Array) -> Any:
    """Of an array that has one: mesh and spec."""
    return array.sharding


class Moves(NamedTuple):
    """Slots to move, numbered on their ranks; the same on all processes. All int `[N]`."""

    src_rank: np.ndarray
    src_slot: np.ndarray
    dst_rank: np.ndarray
    dst_slot: np.ndarray

    def counts(self, num_ranks: int) -> np.ndarray:
        """`[R, R]`: slots by source and destination."""
        pairs = self.src_rank * num_ranks + self.dst_rank
        return np.bincount(pairs, minlength=num_ranks**2).reshape(num_ranks, num_ranks)


@dataclasses.dataclass
class TransferStatistics:
    """What a transfer did.

    Attributes:
      num_rounds: exchanges between the ranks.
      bytes_moved: int64 `[R, R]`, the payload by source and destination rank, along each line of the mesh's axis; what
        stays on its rank is on the diagonal.
    """

    num_rounds: int
    bytes_moved: np.ndarray

    @property
    def bytes_over_links(self) -> int:
        """The payload that left its rank, of all ranks."""
        return int(self.bytes_moved.sum() - np.trace(self.bytes_moved))


class _Tables(NamedTuple):
    """Which slots each rank sends, in order of their destination, and receives, in order of their source."""

    send_slots: np.ndarray  # [R, N]
    send_begin: np.ndarray  # [R, R], where those for a destination begin
    recv_slots: np.ndarray
    recv_begin: np.ndarray

    @staticmethod
    def of(moves: Moves, num_ranks: int) -> _Tables:
        counts = moves.counts(num_ranks)
        size = power_of_two(max(_LEAST_SLOTS, counts.sum(0).max(), counts.sum(1).max()))
        send = _by_rank(moves.src_rank, moves.dst_rank, moves.src_slot, num_ranks, size)
        recv = _by_rank(moves.dst_rank, moves.src_rank, moves.dst_slot, num_ranks, size)
        return _Tables(send, _exclusive_sum(counts), recv, _exclusive_sum(counts.T))


def _by_rank(rank, peer, slot, num_ranks: int, size: int) -> np.ndarray:
    table = np.zeros((num_ranks, size), np.int32)
    order = np.lexsort((np.arange(len(rank)), peer, rank))
    rank, slot = rank[order], slot[order]
    table[rank, np.arange(len(rank)) - np.searchsorted(rank, rank)] = slot
    return table


def _exclusive_sum(counts: np.ndarray) -> np.ndarray:
    return (np.cumsum(counts, axis=1) - counts).astype(np.int32)


def rounds_of(rows: np.ndarray, num_rounds: int):
    """Of each pair's rows `[R, R]`, the first of each round and how many: every round gets about as many."""
    ends = [rows.astype(np.int64) * i // num_rounds for i in range(num_rounds + 1)]
    for first, end in zip(ends, ends[1:], strict=False):
        yield first.astype(np.int32), (end - first).astype(np.int32)


class Mover:
    """Moves slots over one mesh axis by one transport, and keeps the compiled programs."""

    def __init__(self, axis_name: str, num_ranks: int, transport: Transport):
        self._axis_name, self._num_ranks, self._transport = axis_name, num_ranks, transport
        self._program = functools.lru_cache(maxsize=None)(self._build)

    def move(self, source: jax.Array, dest: jax.Array, moves: Moves, num_slot_dims: int) -> tuple[jax.Array, int]:
        """`dest`, which is donated, with slots of `source`; and the number of rounds.

        Both are sharded alike, with dimensions of slots first. Slots of `dest` have the size of those of `source`.
        """
        if not len(moves.src_rank):
            return dest, 0
        transport, sharding = self._transport, named_sharding(dest)
        local = source.sharding.shard_shape(source.shape)
        size = int(np.prod(local[num_slot_dims:]))
        per_slot = _rows.rows_per_slot(size, source.dtype, transport.row_bytes)
        rows = moves.counts(self._num_ranks) * per_slot
        layout, num_rounds = transport.layout(rows)
        step = self._program(sharding, layout, per_slot, num_slot_dims)
        tables = [_replicated(table, sharding.mesh) for table in _Tables.of(moves, self._num_ranks)]
        for first, count in rounds_of(rows, num_rounds):
            dest = step(dest, source, tables, first, count)
        return dest, num_rounds

    def _build(self, sharding: NamedSharding, layout, per_slot: int, num_slot_dims: int) -> Callable:
        """`(dest, source, tables, first, count) -> dest`, one round."""
        transport, axis = self._transport, self._axis_name
        row_bytes = transport.row_bytes

        def send(source, tables, first, count):
            send_slots, send_begin = tables[:2]
            me = jax.lax.axis_index(axis)
            peer, i, is_used = transport.positions(layout, me, count[me], True)
            slot, row = _slot_and_row(send_slots[me], send_begin[me], first[me], peer, i, per_slot)
            rows = _rows.gather_rows(
                _rows.slots_view(source, num_slot_dims), jnp.where(is_used, slot, 0), row, row_bytes
            )
            return rows, jnp.where(is_used, peer, -1)

        def receive(dest, rows, tables, first, count):
            recv_slots, recv_begin = tables[2:]
            me = jax.lax.axis_index(axis)
            peer, i, is_used = transport.positions(layout, me, count[:, me], False)
            slot, row = _slot_and_row(recv_slots[me], recv_begin[me], first[:, me], peer, i, per_slot)
            slots = _rows.slots_view(dest, num_slot_dims)
            slot = jnp.where(is_used, slot, slots.shape[0])
            return _rows.scatter_rows(slots, slot, row, rows, row_bytes).reshape(dest.shape)

        def whole(dest, source, tables, first, count):
            rows, peers = send(source, tables, first, count)
            return receive(dest, transport.exchange(layout, rows, peers), tables, first, count)

        mapped = functools.partial(_mapped, sharding)
        at_axis = NamedSharding(sharding.mesh, _rows_spec(sharding.spec, axis))
        if not transport.is_staged:
            return mapped(whole, ("array", "array", "small", "small", "small"), "array", donate_argnums=0)
        gather = mapped(send, ("array", "small", "small", "small"), ("rows", "rows"), rows=at_axis.spec)
        scatter = mapped(
            receive, ("array", "rows", "small", "small", "small"), "array", rows=at_axis.spec, donate_argnums=0
        )

        def staged(dest, source, tables, first, count):
            rows, _ = gather(source, tables, first, count)
            return scatter(dest, transport.exchange(layout, rows, count), tables, first, count)

        return staged


def _replicated(array: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """Without asking other processes, as `device_put` would, whether theirs is the same."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


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


def _mapped(sharding: NamedSharding, fn: Callable, ins, outs, rows=None, **options) -> Callable:
    kinds = dict(array=sharding.spec, rows=rows, small=PartitionSpec())
    specs = tuple(kinds[kind] for kind in ins)
    out_specs = kinds[outs] if isinstance(outs, str) else tuple(kinds[kind] for kind in outs)
    return jax.jit(jax.shard_map(fn, mesh=sharding.mesh, in_specs=specs, out_specs=out_specs), **options)
