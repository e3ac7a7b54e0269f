"""Fills slots by one op, in memory that ranks reach directly."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep._checks import expect
from jax_ep._transfer import ARRIVES, TransferTables, transfer
from jax_ep._words import as_words, bits_of, from_words
from jax_ep.communicator import MoECommunicator
from jax_ep.eplb import _rows
from jax_ep.eplb._movers import Mover, filled_shape, named_sharding, placed
from jax_ep.eplb._plan import MoveTables, TransferPlan

# Of rows on their way to one peer, and to all, twice: more than the link holds, little enough to stay in a cache.
_WINDOW_BYTES, _ALL_WINDOWS_BYTES = 8 << 20, 16 << 20


class PeerMover(Mover):
    """Rows go through the windows of a `MoECommunicator`, as often as it takes."""

    name = "peer"

    def __init__(self, mesh, axis_name, row_bytes, budget_bytes, *, implementation, timeout_s):
        self.row_bytes, self._axis_name = row_bytes, axis_name
        num_ranks = mesh.shape[axis_name]
        per_row, small = _arena_bytes(num_ranks, row_bytes)
        least = small + per_row
        expect(budget_bytes >= least, "memory_budget_bytes", f"at least {least} bytes", budget_bytes)
        window = max(_WINDOW_BYTES, _ALL_WINDOWS_BYTES // max(1, num_ranks - 1))
        self.max_rows = min((budget_bytes - small) // per_row, max(1, window // row_bytes))
        self.comm = MoECommunicator(
            mesh,
            axis_name=axis_name,
            num_experts=num_ranks,
            hidden_size=row_bytes // 2,
            topk=1,
            max_tokens_per_rank=self.max_rows,
            max_recv_tokens_per_rank=1,
            dtype=jnp.bfloat16,
            implementation=implementation,
            timeout_s=timeout_s,
        )
        self._last = None  # (plan, mesh, tables)
        self._program = functools.lru_cache(maxsize=None)(self._build)

    def fill(self, source: jax.Array, plan: TransferPlan, num_slot_dims: int) -> tuple[jax.Array, int]:
        sharding = named_sharding(source)
        num_ranks, num_slots = plan.local_source.shape
        tables = self._placed_tables(plan, sharding.mesh)
        filled = self._program(sharding, num_slots, num_slot_dims)(source, tables)
        per_slot = _rows.rows_per_slot(_rows.slot_size(source, num_slot_dims), source.dtype, self.row_bytes)
        return filled, -(-int(plan.moves.counts(num_ranks).max()) * per_slot // self.max_rows)

    def _placed_tables(self, plan: TransferPlan, mesh: jax.sharding.Mesh) -> jax.Array:
        """Those of the last plan are kept: all arrays of a model are filled by it."""
        if self._last is None or self._last[0] is not plan or self._last[1] != mesh:
            self._last = plan, mesh, placed(tables_of(plan).pack().reshape(-1), mesh, self._axis_name)
        return self._last[2]

    def _build(self, sharding: NamedSharding, num_slots: int, num_slot_dims: int) -> Callable:
        def fill(source, tables):
            slots = _rows.slots_view(source, num_slot_dims)
            if bits_of(source.dtype) < 8:
                slots = as_words(slots)
            out = from_words(transfer(self.comm._spec, slots, tables, num_slots), source.dtype)
            return out.reshape(filled_shape(source.shape, num_slots, num_slot_dims))

        specs = sharding.spec, PartitionSpec(self._axis_name)
        return jax.jit(jax.shard_map(fill, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec))

    def check(self) -> None:
        self.comm.check()

    def close(self) -> None:
        self.comm.destroy()


def tables_of(plan: TransferPlan) -> TransferTables:
    """`[R, ...]`."""
    num_ranks, num_slots = plan.local_source.shape
    counts, moved = plan.moves.counts(num_ranks), MoveTables.of(plan.moves, num_ranks)
    source, following = plan.local_source.copy(), np.full_like(plan.local_source, -1)
    source[plan.moves.dst_rank, plan.moves.dst_slot] = ARRIVES
    if plan.copies is not None:
        ranks, copies = np.nonzero(plan.copies != np.arange(num_slots))
        source[ranks, copies] = ARRIVES
        for rank, copy in zip(ranks, copies, strict=True):
            first = plan.copies[rank, copy]
            following[rank, copy], following[rank, first] = following[rank, first], copy
    return TransferTables(
        source=source,
        next=following,
        send_begin=np.concatenate([moved.send_begin, counts.sum(1, keepdims=True)], axis=1),
        recv_begin=np.concatenate([moved.recv_begin, counts.T.sum(1, keepdims=True)], axis=1),
        most=np.full((num_ranks, 1), counts.max()),
        send_slots=moved.send_slots,
        recv_slots=moved.recv_slots,
    )


def _arena_bytes(num_ranks: int, row_bytes: int) -> tuple[int, int]:
    """For each row of a window, and besides."""
    per_row = 2 * (num_ranks - 1) * row_bytes + 32 * num_ranks + num_ranks**2 // 16
    return per_row, (16 << 10) + 16 * num_ranks**2
