"""`EplbCommunicator`: arrays and slots of experts from rank to rank of one mesh axis."""

from __future__ import annotations

import collections
import contextlib
import json
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep import _bootstrap, _ffi
from jax_ep._checks import expect, expect_concrete, expect_int, expect_mesh, expect_number
from jax_ep._config import _IMPLEMENTATIONS
from jax_ep._processes import Processes, communicator_id, give_back_id
from jax_ep.eplb import _rows
from jax_ep.eplb._movers import Mover, TransferStatistics
from jax_ep.eplb._peer import PeerMover
from jax_ep.eplb._plan import Moves, TransferPlan
from jax_ep.eplb._rounds import RoundsMover
from jax_ep.eplb._transports import HostTransport, XlaTransport, stepped

_TRANSPORTS = ("peer", "xla", "host")
_BUDGET_BYTES = {"gpu": 1 << 30}
_BUDGET_BYTES_ELSEWHERE = 64 << 20


class _Message(NamedTuple):
    """An array that travels, or the one of its receiver; equal on both sides if they match."""

    src: int
    dst: int
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    def num_rows(self, row_bytes: int) -> int:
        return _rows.rows_per_slot(math.prod(self.shape), self.dtype, row_bytes)


class EplbCommunicator:
    """Moves arrays, and the weights of experts, between the ranks of a mesh axis.

    Build it on all processes of the mesh alike, and call `execute` and `transfer_experts` on all of them in the same
    order. What travels are bits: any values, NaNs included, arrive as they were.

    Args:
      mesh: a `jax.sharding.Mesh`. Its other axes serve `transfer_experts` alone.
      axis_name: the axis whose R positions are the ranks.
      transport: "peer": the kernels of `MoECommunicator`, in memory that ranks reach directly. "xla": collectives of
        XLA, which also reach other hosts. "host": through the hosts' memory and, between processes, the key-value store
        of `jax.distributed`: slow, for what nothing else connects. Default "peer" where it can be, else "xla".
      memory_budget_bytes: what rounds take on a device at most, arenas included. What does not fit into one round goes
        in several. Default 1 GiB on GPUs, 64 MiB elsewhere. `execute` packs what it sends and receives besides.
      row_bytes: arrays travel as rows of so many bytes, a multiple of 16; each array takes whole rows.
      implementation: of transport "peer", see `MoECommunicator`.
      timeout_s: seconds that a process waits for another, or up to one more, and with "peer" a rank for another.
        Collectives of XLA have timeouts of their own.

    Raises:
      ValueError, TypeError: an argument is unusable, or differs between processes.
      RuntimeError: a process does not build it within the timeout.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        *,
        axis_name: str = "ep",
        transport: str | None = None,
        memory_budget_bytes: int | None = None,
        row_bytes: int = 14336,
        implementation: str | None = None,
        timeout_s: float = 30.0,
    ):
        expect_mesh(mesh)
        expect(axis_name in mesh.axis_names, "axis_name", f"one of {mesh.axis_names}", repr(axis_name))
        expect(transport is None or transport in _TRANSPORTS, "transport", f"one of {_TRANSPORTS}", repr(transport))
        platform = mesh.devices.flat[0].platform
        if memory_budget_bytes is None:
            memory_budget_bytes = _BUDGET_BYTES.get(platform, _BUDGET_BYTES_ELSEWHERE)
        memory_budget_bytes = expect_int("memory_budget_bytes", memory_budget_bytes)
        row_bytes = expect_int("row_bytes", row_bytes)
        expect(row_bytes % 16 == 0, "row_bytes", "a multiple of 16", row_bytes)
        expect(0 < expect_number("timeout_s", timeout_s) < math.inf, "timeout_s", "seconds above 0", timeout_s)
        names = ", ".join(f'"{name}"' for name in _IMPLEMENTATIONS)
        expect(implementation in (None, *_IMPLEMENTATIONS), "implementation", f"one of {names}", repr(implementation))
        self.mesh, self.axis_name, self.num_ranks = mesh, axis_name, mesh.shape[axis_name]
        self._devices = list(mesh.devices.flat)
        self._processes = Processes.of(mesh, communicator_id(mesh, axis_name), timeout_s)
        self._sends: list[tuple[_Message, Any]] = []
        self._recvs: list[_Message] = []
        self._is_destroyed = False
        options = dict(transport=transport, memory_budget_bytes=memory_budget_bytes, row_bytes=row_bytes)
        try:
            self._processes.agree("EplbCommunicator", str(options | dict(implementation=implementation)))
        except BaseException:
            # The others will count from here when all build one again.
            give_back_id(mesh, axis_name)
            raise
        if transport is None:
            transport = self._best_transport(platform, implementation)
        self._mover = self._connected(transport, row_bytes, memory_budget_bytes, implementation, timeout_s)
        self.statistics: TransferStatistics | None = None

    def _best_transport(self, platform: str, implementation: str | None) -> str:
        """The same on all processes."""
        mine = _bootstrap.host_identity() if _has_kernels(platform, implementation) else ""
        hosts = set(self._processes.share("EplbCommunicator, transport", mine.encode()).values())
        return "peer" if hosts != {b""} and len(hosts) == 1 else "xla"

    def _connected(self, name: str, row_bytes, budget_bytes, implementation, timeout_s) -> Mover:
        where = self.mesh, self.axis_name, row_bytes, budget_bytes
        if name == "peer":
            return PeerMover(*where, implementation=implementation, timeout_s=timeout_s)
        transport = XlaTransport(*where) if name == "xla" else HostTransport(*where, self._processes)
        return RoundsMover(self.axis_name, transport)

    @property
    def transport(self) -> str:
        """The name of the transport."""
        return self._mover.name

    @property
    def local_ranks(self) -> list[int]:
        """The ranks whose devices are this process's."""
        me = jax.process_index()
        return [rank for rank, device in enumerate(self._devices) if device.process_index == me]

    def add_send(self, array, dst_rank: int, src_rank: int | None = None) -> None:
        """Adds an array to what the next `execute` sends.

        Args:
          array: of any shape, and any dtype of numbers. One of numpy is copied; one on a device must not be deleted
            or donated before `execute` is done.
          dst_rank: where it goes; its own rank too.
          src_rank: the rank of this process that sends it, to whose device it is copied if it is elsewhere. Default the
            rank on whose device it is, or the only one of this process.

        Raises:
          ValueError, TypeError: an argument is unusable.
        """
        self._expect_live("add_send")
        if not isinstance(array, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"array: expected an array, got {type(array).__name__}")
        expect_concrete("array", array)
        src, dst = self._local_rank("src_rank", src_rank, array), self._rank("dst_rank", dst_rank)
        message = _message_of("array", array, src, dst)
        is_jaxs = isinstance(array, jax.Array)
        kept = jax.device_put(array, self._devices[src]) if is_jaxs else np.array(array, message.dtype)
        self._sends.append((message, kept))

    def add_recv(self, like, src_rank: int, dst_rank: int | None = None) -> None:
        """Adds an array to what the next `execute` receives.

        The n-th receive of a rank from another is the n-th send of that one to it.

        Args:
          like: an array, or `jax.ShapeDtypeStruct`, of the shape and dtype that are sent.
          src_rank: where it comes from.
          dst_rank: the rank of this process that receives it; default as for `add_send`.

        Raises:
          ValueError, TypeError: an argument is unusable.
        """
        self._expect_live("add_recv")
        if not hasattr(like, "shape") or not hasattr(like, "dtype"):
            raise TypeError(f"like: expected an array or a jax.ShapeDtypeStruct, got {type(like).__name__}")
        expect_concrete("like", like)
        dst, src = self._local_rank("dst_rank", dst_rank, like), self._rank("src_rank", src_rank)
        self._recvs.append(_message_of("like", like, src, dst))

    def execute(self) -> list[jax.Array]:
        """Sends and receives all that was added since the last call, and waits for it.

        All processes call it, also those with nothing to send or receive. Whether it succeeds or raises, nothing that
        was added is left.

        Returns:
          The received arrays in the order of this process's `add_recv`, each on its rank's device.

        Raises:
          ValueError: sends and receives do not match, an array was deleted since it was added, or a process calls
            `transfer_experts`; on all processes, before anything moves.
          RuntimeError: a process did not call it within the timeout; on all that did.
          PeerTimeoutError: with transport "peer", a rank stopped; build another communicator.
        """
        self._expect_live("execute")
        sends, recvs, self._sends, self._recvs = self._sends, self._recvs, [], []
        mine = json.dumps([[message for message, _ in sends], recvs]).encode()
        everyones = [json.loads(text) for text in self._processes.share("execute", mine, _deleted(sends)).values()]
        sent, expected = ([_message(*m) for each in everyones for m in each[side]] for side in (0, 1))
        _check_matched(sent, expected)
        row_bytes = self._mover.row_bytes
        rows = np.zeros((self.num_ranks, self.num_ranks), np.int64)
        for message in sent:
            rows[message.src, message.dst] += message.num_rows(row_bytes)
        source = self._packed(sends, stepped(max(1, rows.sum(1).max())))
        with self._moving():
            dest, num_rounds = self._mover.fill(source, _row_plan(rows), 1)
            out = jax.block_until_ready(self._unpacked(dest, recvs))
        self.statistics = TransferStatistics(num_rounds, rows * row_bytes)
        return out

    def _sharding(self) -> NamedSharding:
        # With explicit axes, the shard of a mesh of one device would be typed as sharded.
        mesh = jax.sharding.Mesh(self.mesh.devices, self.mesh.axis_names)
        return NamedSharding(mesh, PartitionSpec(self.axis_name))

    def _packed(self, sends: list[tuple[_Message, Any]], num_rows: int) -> jax.Array:
        """`[R * num_rows, row_bytes / 2]`: each rank's arrays, those for rank 0 first."""
        shards = []
        for rank in self.local_ranks:
            mine = sorted((item for item in sends if item[0].src == rank), key=lambda item: item[0].dst)
            arrays = [array for _, array in mine]
            shards.append(_rows.pack(arrays, num_rows, self._mover.row_bytes, self._devices[rank]))
        shape = self.num_ranks * num_rows, self._mover.row_bytes // 2
        return jax.make_array_from_single_device_arrays(shape, self._sharding(), shards)

    def _unpacked(self, dest: jax.Array, recvs: list[_Message]) -> list[jax.Array]:
        """The arrays, from each rank's rows, those of rank 0 first."""
        shards = {shard.device: shard.data for shard in dest.addressable_shards}
        out: list[Any] = [None] * len(recvs)
        for rank in self.local_ranks:
            mine = sorted((i for i, message in enumerate(recvs) if message.dst == rank), key=lambda i: recvs[i].src)
            like = [(recvs[i].shape, recvs[i].dtype) for i in mine]
            arrays = _rows.unpack(shards[self._devices[rank]], like, self._mover.row_bytes)
            for i, array in zip(mine, arrays, strict=True):
                out[i] = array
        return out

    @contextlib.contextmanager
    def _moving(self):
        """Raises what went wrong while something moved; what is waited for inside has arrived."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            self._mover.check()  # which knows better
            raise
        self._mover.check()

    def destroy(self) -> None:
        """Frees memory and connections; on all processes, in the same order. Idempotent."""
        if not self._is_destroyed:
            self._is_destroyed = True
            self._sends, self._recvs = [], []
            self._mover.close()
            self._processes.close()

    def __enter__(self) -> EplbCommunicator:
        return self

    def __exit__(self, *_) -> None:
        self.destroy()

    def _expect_live(self, op: str) -> None:
        if self._is_destroyed:
            raise ValueError(f"{op}: expected a live EplbCommunicator, got one after destroy()")

    def _rank(self, argument: str, rank: int) -> int:
        rank = expect_int(argument, rank, minimum=0)
        expect(rank < self.num_ranks, argument, f"a rank below {self.num_ranks}", rank)
        return rank

    def _local_rank(self, argument: str, rank: int | None, array) -> int:
        others = "no other axis for add_send and add_recv"
        expect(self.mesh.size == self.num_ranks, "mesh", others, dict(self.mesh.shape))
        local = self.local_ranks
        mine = f"one of this process's ranks {local}"
        if rank is not None:
            rank = self._rank(argument, rank)
            expect(rank in local, argument, mine, rank)
            return rank
        if len(local) == 1:
            return local[0]
        devices = array.devices() if isinstance(array, jax.Array) else set()
        found = [rank for rank in local if devices == {self._devices[rank]}]
        expect(len(found) == 1, argument, f"{mine}, or an array on the device of one", "None")
        return found[0]


def create_eplb_communicator(mesh: jax.sharding.Mesh, transport: str | None = None, **arguments) -> EplbCommunicator:
    """An `EplbCommunicator` with the named transport, or the best that works. Takes what that takes, and raises what
    it raises."""
    return EplbCommunicator(mesh, transport=transport, **arguments)


def _has_kernels(platform: str, implementation: str | None) -> bool:
    name = implementation or {"gpu": "cuda", "cpu": "cpu"}.get(platform, "reference")
    if name == "reference":
        return False
    try:
        _ffi.extension(name)
    except NotImplementedError:
        return False
    return True


def _deleted(sends: list[tuple[_Message, Any]]) -> ValueError | None:
    """What is wrong if an array is gone that was to be sent."""
    for message, array in sends:
        if isinstance(array, jax.Array) and array.is_deleted():
            src, dst = message.src, message.dst
            return ValueError(f"array: expected {message} from rank {src} to rank {dst}, got one that was deleted")
    return None


def _message_of(argument: str, array, src: int, dst: int) -> _Message:
    dtype = np.dtype(array.dtype) if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended) else array.dtype
    _rows.expect_movable(argument, dtype)
    kept = jax.dtypes.canonicalize_dtype(dtype)
    expect(kept == dtype, argument, f"dtype {kept}, or jax_enable_x64", dtype)
    return _Message(src, dst, tuple(array.shape), np.dtype(dtype).name)


def _message(src: int, dst: int, shape: list[int], dtype: str) -> _Message:
    return _Message(src, dst, tuple(shape), dtype)


def _row_plan(rows: np.ndarray) -> TransferPlan:
    """Each rank's rows, sorted by destination, to where they are sorted by source. There is room for a few more, so
    that they do not ask for another program."""
    src, dst = (index.reshape(-1) for index in np.indices(rows.shape))
    counts = rows.reshape(-1)
    i = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    send_begin, recv_begin = np.cumsum(rows, axis=1) - rows, np.cumsum(rows, axis=0) - rows
    moves = Moves(
        np.repeat(src, counts),
        np.repeat(send_begin.reshape(-1), counts) + i,
        np.repeat(dst, counts),
        np.repeat(recv_begin.reshape(-1), counts) + i,
    )
    local_source = np.full((len(rows), stepped(max(1, rows.sum(0).max()))), -1, np.int32)
    stays = moves.src_rank == moves.dst_rank
    local_source[moves.dst_rank[stays], moves.dst_slot[stays]] = moves.src_slot[stays]
    return TransferPlan(local_source, Moves(*(column[~stays] for column in moves)), None)


_MOST_LISTED = 4


def _check_matched(sent: list[_Message], expected: list[_Message]) -> None:
    """Raises unless each pair of ranks agrees about what travels between them."""

    def by_pair(messages: list[_Message]) -> dict[tuple[int, int], list[_Message]]:
        pairs = collections.defaultdict(list)
        for message in messages:
            pairs[message.src, message.dst].append(message)
        return pairs

    def named(messages: list[_Message]) -> str:
        rest = [f"and {len(messages) - _MOST_LISTED} more"] if len(messages) > _MOST_LISTED else []
        return ", ".join([*map(str, messages[:_MOST_LISTED]), *rest]) or "nothing"

    sends, recvs = by_pair(sent), by_pair(expected)
    for src, dst in sorted(sends.keys() | recvs.keys()):
        send, recv = sends[src, dst], recvs[src, dst]
        if send != recv:
            raise ValueError(
                f"execute: rank {src} sends {named(send)} to rank {dst}, which expects {named(recv)} from it"
            )
