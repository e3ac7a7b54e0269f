"""Two ways for rows of bytes to get from rank to rank in rounds: XLA's collectives, and through the host.

A round moves rows `uint16 [T, row_bytes / 2]` on each rank. A transport says how many rounds a pattern takes and how
its rows lie in them (`layout`, which programs are compiled for), and moves them.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep._checks import expect
from jax_ep._processes import Processes
from jax_ep.eplb._plan import power_of_two

# Of a budget, for what does not grow with the rows of a round.
_SMALL_BYTES = 16 << 10


class Transport(abc.ABC):
    """One way. `row_bytes` is the size of a row, `max_rows` what a rank sends and receives in a round at most."""

    name: str
    # Whether rows leave the device between two programs, instead of within one.
    is_staged = False

    def __init__(self, num_ranks: int, row_bytes: int, budget_bytes: int):
        self.num_ranks, self.row_bytes = num_ranks, row_bytes
        # On a device, for a row of a round: gathered and cast, received and cast; and where it comes from and goes.
        per_row = 4 * row_bytes + 64
        least = _SMALL_BYTES + 2 * num_ranks * per_row
        expect(budget_bytes >= least, "memory_budget_bytes", f"at least {least} bytes", budget_bytes)
        self.max_rows = (budget_bytes - _SMALL_BYTES) // per_row

    @abc.abstractmethod
    def layout(self, rows: np.ndarray) -> tuple[Any, int]:
        """For rows `[R, R]` by source and destination: how they lie in a round, hashable, and how many rounds."""

    @abc.abstractmethod
    def positions(self, layout, me, count, is_sender: bool):
        """For each row of a rank's round: the rank at its other end, its number among that one's rows, and whether
        there is such a row. Traced; `count` int32 `[R]` has the rows per peer."""

    @abc.abstractmethod
    def exchange(self, layout, rows, count):
        """Rows that are sent -> those received; `count` int32 `[R, R]` has them by source and destination.

        Traced per device. If `is_staged`, called between programs, with the rows of all ranks.
        """


class XlaTransport(Transport):
    """`ppermute` for each distance between ranks: a program for each pattern of distances, with sizes rounded up."""

    name = "xla"

    def __init__(self, mesh, axis_name, row_bytes, budget_bytes):
        super().__init__(mesh.shape[axis_name], row_bytes, budget_bytes)
        self._axis_name = axis_name

    def layout(self, rows: np.ndarray) -> tuple[Any, int]:
        """The rows for each distance, those of the pair with most."""
        sources = np.arange(self.num_ranks)
        most = np.array([rows[sources, (sources + d) % self.num_ranks].max() for d in range(self.num_ranks)])
        num_rounds = -(-int(most.sum()) // self.max_rows)
        while True:
            share = -(-most // num_rounds)
            sizes = tuple(stepped(size) for size in share)
            if sum(sizes) > self.max_rows:
                sizes = tuple(int(size) for size in share)
            if sum(sizes) <= self.max_rows:
                return sizes, num_rounds
            num_rounds += 1

    def positions(self, layout, me, count, is_sender: bool):
        distance = np.repeat(np.arange(self.num_ranks, dtype=np.int32), layout)
        begin = np.repeat(np.cumsum([0, *layout[:-1]], dtype=np.int32), layout)
        i = jnp.asarray(np.arange(sum(layout), dtype=np.int32) - begin)
        peer = (me + distance if is_sender else me - distance) % np.int32(self.num_ranks)
        return peer, i, i < count[peer]

    def exchange(self, layout, rows, count):
        del count
        received, begin = [], 0
        for distance, size in enumerate(layout):
            part, begin = rows[begin : begin + size], begin + size
            if size and distance:
                pairs = [(rank, (rank + distance) % self.num_ranks) for rank in range(self.num_ranks)]
                part = lax.ppermute(part, self._axis_name, pairs)
            received.append(part)
        return jnp.concatenate(received)


class HostTransport(Transport):
    """Through the memory of the hosts, and between processes through the key-value store of `jax.distributed`: slow,
    but it needs nothing else."""

    name = "host"
    is_staged = True

    def __init__(self, mesh, axis_name, row_bytes, budget_bytes, processes: Processes):
        super().__init__(mesh.shape[axis_name], row_bytes, budget_bytes)
        self._axis_name, self._processes = axis_name, processes

    def layout(self, rows: np.ndarray) -> tuple[Any, int]:
        """Sorted by peer, without gaps."""
        most = max(rows.sum(0).max(), rows.sum(1).max())
        # A pair's share of a round is rounded up, so a rank has up to R rows more than the mean.
        num_rounds = 1 if most <= self.max_rows else -(-int(most) // (self.max_rows - self.num_ranks))
        share = -(-rows // num_rounds)
        return min(self.max_rows, power_of_two(max(share.sum(0).max(), share.sum(1).max()))), num_rounds

    def positions(self, layout, me, count, is_sender: bool):
        del me, is_sender
        position = jnp.arange(layout, dtype=jnp.int32)
        end = jnp.cumsum(count, dtype=jnp.int32)
        peer = jnp.searchsorted(end, position, side="right", method="compare_all").astype(jnp.int32)
        peer = jnp.minimum(peer, self.num_ranks - 1)
        return peer, position - (end - count)[peer], position < end[-1]

    def exchange(self, layout, rows, count):
        begin = np.cumsum(count, axis=1) - count
        places = _places(rows.sharding.mesh, self._axis_name)
        pieces = {}
        for shard in rows.addressable_shards:
            (line, src), data = places[shard.device], np.asarray(shard.data)
            for dst in range(self.num_ranks):
                pieces[line, src, dst] = data[begin[src, dst] : begin[src, dst] + count[src, dst]]
        if len(self._processes.all) > 1:
            pieces |= self._from_other_processes(pieces, places, count)
        nothing = np.zeros((0, self.row_bytes // 2), np.uint16)

        def received(device: jax.Device) -> jax.Array:
            line, dst = places[device]
            parts = [pieces.get((line, src, dst), nothing) for src in range(self.num_ranks)]
            unused = np.zeros((layout - sum(map(len, parts)), self.row_bytes // 2), np.uint16)
            return jax.device_put(np.concatenate([*parts, unused]), device)

        shards = [received(shard.device) for shard in rows.addressable_shards]
        return jax.make_array_from_single_device_arrays(rows.shape, rows.sharding, shards)

    def _from_other_processes(self, pieces, places, count):
        """What ranks here receive from ranks of other processes, whose rows come as one value."""
        me = jax.process_index()
        others = [process for process in self._processes.all if process != me]

        def keys(source: int, destination: int):
            return [
                (line, src, dst)
                for sender, (line, src) in places.items()
                for receiver, (other_line, dst) in places.items()
                if line == other_line and count[src, dst]
                if (sender.process_index, receiver.process_index) == (source, destination)
            ]

        outgoing = {other: b"".join(pieces[key].tobytes() for key in keys(me, other)) for other in others}
        incoming = {other: keys(other, me) for other in others}
        sizes = {
            other: sum(int(count[src, dst]) for _, src, dst in keys) * self.row_bytes
            for other, keys in incoming.items()
        }
        received = {}
        for other, data in self._processes.exchange("transfer", outgoing, sizes).items():
            rows = np.frombuffer(data, np.uint16).reshape(-1, self.row_bytes // 2)
            ends = np.cumsum([count[src, dst] for _, src, dst in incoming[other]], dtype=np.int64)
            received |= dict(zip(incoming[other], np.split(rows, ends[:-1]), strict=True) if len(ends) else ())
        return received


def _places(mesh: jax.sharding.Mesh, axis_name: str) -> dict[jax.Device, tuple[tuple[int, ...], int]]:
    """Each device's position on the mesh's other axes, and its rank."""
    axis = mesh.axis_names.index(axis_name)
    return {
        device: ((*index[:axis], *index[axis + 1 :]), index[axis]) for index, device in np.ndenumerate(mesh.devices)
    }


def stepped(n: int) -> int:
    """The same, by at most a quarter more than n, where more would cost more than compiling."""
    step = 1 << max(0, int(n).bit_length() - 3)
    return -(-int(n) // step) * step
