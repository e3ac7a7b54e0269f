"""Checks of moving arrays and experts; and one process of a test across processes: `python eplb_worker.py TASK`.

Every process draws all data from one seed and checks what it holds itself, as in `worker.py`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from jax._src import distributed
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_ep import PeerTimeoutError
from jax_ep._words import bits_of
from jax_ep.eplb import EplbCommunicator, transfer_experts

ROW_BYTES, BUDGET_BYTES = 64, 80 << 10
DTYPES = (
    "bfloat16",
    "float16",
    "float32",
    "int8",
    "uint32",
    "bool",
    "complex64",
    "float8_e4m3fn",
    "float8_e8m0fnu",
    "int4",
)
SHAPES = ((), (0,), (5,), (33, 7), (1000,))


class Message(NamedTuple):
    src: int
    dst: int
    array: np.ndarray


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Any bits, those of signalling NaNs and of subnormal numbers among them."""
    dtype = jnp.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.name in ("int2", "uint4", "int4", "float4_e2m1fn"):
        return rng.integers(0, 1 << bits_of(dtype), shape).astype(np.uint8).view(dtype)
    data = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return data.view(dtype).reshape(shape)


def communicator(mesh: Mesh, transport: str, implementation: str | None = None, **arguments) -> EplbCommunicator:
    """With rows so short, and memory so scarce, that there are several rounds."""
    options = dict(row_bytes=ROW_BYTES, memory_budget_bytes=BUDGET_BYTES, timeout_s=20.0) | arguments
    if transport == "peer":
        options["implementation"] = implementation
    return EplbCommunicator(mesh, transport=transport, **options)


def draw_messages(rng: np.random.Generator, num_ranks: int, number: int) -> list[Message]:
    return [
        Message(
            *rng.integers(0, num_ranks, 2).tolist(),
            random_bits(rng, SHAPES[rng.integers(len(SHAPES))], DTYPES[rng.integers(len(DTYPES))]),
        )
        for _ in range(number)
    ]


def check_messages(comm: EplbCommunicator, messages: list[Message]) -> None:
    """What is sent arrives, in order for each pair, bit for bit, where it belongs."""
    devices = list(comm.mesh.devices.flat)
    expected = []
    for message in messages:
        if message.src in comm.local_ranks:
            comm.add_send(message.array, message.dst, message.src)
    # Other pairs' order does not matter.
    for message in sorted(messages, key=lambda message: message.src, reverse=True):
        if message.dst in comm.local_ranks:
            like = jax.ShapeDtypeStruct(message.array.shape, message.array.dtype)
            comm.add_recv(like, message.src, message.dst)
            expected.append(message)
    received = comm.execute()
    assert len(received) == len(expected)
    for message, array in zip(expected, received, strict=True):
        assert array.devices() == {devices[message.dst]}
        assert (array.shape, array.dtype) == (message.array.shape, message.array.dtype)
        assert np.asarray(array).tobytes() == message.array.tobytes()
    counted = np.zeros((comm.num_ranks,) * 2, np.int64)
    for src, dst, array in messages:
        counted[src, dst] += -(-array.nbytes // ROW_BYTES) * ROW_BYTES
    np.testing.assert_array_equal(comm.statistics.bytes_moved, counted)


def check_unmatched(comm: EplbCommunicator) -> None:
    """An error on every process, which names ranks and sizes, and leaves nothing behind."""
    last = comm.num_ranks - 1
    if 0 in comm.local_ranks:
        comm.add_send(np.zeros((3, 2), np.float32), last, 0)
        comm.add_send(np.zeros(4, np.int8), last, 0)
    with pytest.raises(ValueError, match=rf"rank 0 sends float32\[3, 2\], int8\[4\] to rank {last}, which expects no"):
        comm.execute()
    if last in comm.local_ranks:
        comm.add_recv(jax.ShapeDtypeStruct((7,), jnp.bfloat16), 0, last)
    with pytest.raises(ValueError, match=rf"rank 0 sends nothing to rank {last}, which expects bfloat16\[7\] from it"):
        comm.execute()
    for shape, dtype in (((4,), jnp.float32), ((3,), jnp.int32)):
        if 0 in comm.local_ranks:
            comm.add_send(np.zeros(3, np.float32), last, 0)
        if last in comm.local_ranks:
            comm.add_recv(jax.ShapeDtypeStruct(shape, dtype), 0, last)
        text = rf"rank 0 sends float32\[3\] to rank {last}, which expects {jnp.dtype(dtype).name}\[{shape[0]}\] from it"
        with pytest.raises(ValueError, match=text):
            comm.execute()
    assert comm.execute() == []


def draw_placement(rng: np.random.Generator, layers: int, num_slots: int, num_experts: int) -> np.ndarray:
    """`[layers, P]`: every expert once at least, and replicas or nothing in the other slots."""
    rest = rng.integers(-1, num_experts, (layers, num_slots - num_experts))
    everyone = np.broadcast_to(np.arange(num_experts), (layers, num_experts))
    return rng.permuted(np.concatenate([everyone, rest], axis=1), axis=1)


def placed(rng: np.random.Generator, experts: np.ndarray, slots: np.ndarray, empty: bool) -> np.ndarray:
    """`[layers, E, ...]` in slots `[layers, P]`; those without an expert hold zeros, or with `empty` anything."""
    out = np.take_along_axis(experts, np.maximum(slots, 0).reshape(*slots.shape, *[1] * (experts.ndim - 2)), axis=1)
    out[slots < 0] = random_bits(rng, out[slots < 0].shape, out.dtype) if empty else np.zeros((), out.dtype)
    return out


def check_transfer(
    comm: EplbCommunicator, rng, *, layers: int | None = 2, per_rank: int = 3, tails=None, spec=(), **arguments
) -> None:
    """Against a gather, bit for bit."""
    num_slots = comm.num_ranks * per_rank
    old, new = (draw_placement(rng, layers or 1, num_slots, max(1, num_slots * 2 // 3)) for _ in range(2))
    tails = tails or {"bfloat16": (5, 31), "float32": (16,), "int8": ()}
    spec = P("ep", *spec) if layers is None else P(None, "ep", *spec)
    params, want = {}, {}
    for dtype, tail in tails.items():
        experts = random_bits(rng, (layers or 1, old.max() + 1, *tail), dtype)
        before, after = placed(rng, experts, old, True), placed(rng, experts, new, False)
        before, after = (before[0], after[0]) if layers is None else (before, after)
        params[dtype], want[dtype] = suite.put(before, comm.mesh, spec), after
    shardings = {dtype: array.sharding for dtype, array in params.items()}
    step = jnp.zeros((), jnp.int32)
    placements = (old[0], new[0]) if layers is None else (old, new)
    got, got_step = transfer_experts((params, step), *placements, comm, **arguments)
    assert got_step is step
    for dtype, array in got.items():
        assert array.shape == want[dtype].shape and array.dtype == want[dtype].dtype
        assert array.sharding.is_equivalent_to(shardings[dtype], array.ndim)
        for index, shard in suite.local(array):
            assert shard.tobytes() == want[dtype][index].tobytes(), dtype


# ---- across processes ----


def check_all(mesh: Mesh, implementation: str) -> None:
    rng = np.random.default_rng(0)
    for transport in ("peer", "xla", "host"):
        with communicator(mesh, transport, implementation) as comm:
            check_unmatched(comm)
            check_messages(comm, draw_messages(rng, mesh.size, 4))
            check_transfer(comm, rng, tails={"bfloat16": (5, 31)})
    with EplbCommunicator(mesh, memory_budget_bytes=1 << 20) as comm:
        assert comm.transport == "peer"
    with pytest.raises(ValueError, match="were given different arguments: .*row_bytes"):
        communicator(mesh, "xla", row_bytes=16 * (2 + jax.process_index()))
    check_mistakes(mesh)


def check_mistakes(mesh: Mesh) -> None:
    """What one process does wrong is an error on both, at once, and the next call works."""
    last = jax.process_index() == 1
    array = jax.device_put(np.arange(3, dtype=np.int32), jax.local_devices()[-1])
    slots = np.arange(mesh.size)
    with communicator(mesh, "xla", timeout_s=60.0) as comm:
        start = time.monotonic()
        if last:
            comm.add_send(array, 0, mesh.size - 1)
            array.delete()
        text = (
            rf"array: expected int32\[3\] from rank {mesh.size - 1} to rank 0, got one that was deleted, on process 1"
        )
        with pytest.raises(ValueError, match=text):
            comm.execute()
        params = suite.put(np.ones((mesh.size, 3), np.float32), mesh, P("ep"))
        with pytest.raises(ValueError, match="transfer_experts: processes 0 and 1 were given different arguments"):
            transfer_experts(params, slots, np.roll(slots, jax.process_index()), comm)
        with pytest.raises(ValueError, match=r"new: expected an integer dtype, got float64, on process 1"):
            transfer_experts(params, slots, slots * (1.0 if last else 1), comm)
        if last:
            params.delete()
        for given in (dict(communicator=comm), dict(transport="xla", timeout_s=60.0)):
            with pytest.raises(ValueError, match="params: expected an array that is there, .*, on process 1"):
                transfer_experts(params, slots, slots[::-1], **given)
        with pytest.raises(ValueError, match="processes 0 and 1 are in different calls: execute, transfer_experts"):
            transfer_experts({}, slots, slots, comm) if last else comm.execute()
        check_messages(comm, draw_messages(np.random.default_rng(1), mesh.size, 3))
        assert time.monotonic() - start < 30


def check_absence(mesh: Mesh) -> None:
    """A process that does not come is an error for the others, in time, and nothing that later calls stumble over."""
    client, is_early = distributed.global_state.client, jax.process_index() != 1
    text = r": not all of processes \[0, 1, 2\] called it within timeout_s=0.5"
    start = time.monotonic()
    if is_early:
        with pytest.raises(RuntimeError, match="EplbCommunicator" + text):
            communicator(mesh, "host", timeout_s=0.5)
    client.wait_at_barrier("built", 60_000)
    with communicator(mesh, "host") as comm:
        comm._processes._timeout_s = 0.5
        if is_early:
            with pytest.raises(RuntimeError, match="execute" + text):
                comm.execute()
        client.wait_at_barrier("executed", 60_000)
        assert time.monotonic() - start < 15
        comm._processes._timeout_s = 20.0
        rng = np.random.default_rng(2)
        check_messages(comm, draw_messages(rng, mesh.size, 6))
        check_transfer(comm, rng, layers=None, tails={"int8": (131,)})


def check_lost(mesh: Mesh) -> None:
    """The last process takes part in what precedes a transfer, and not in the transfer."""
    survives = jax.process_index() == 0
    with communicator(mesh, "xla") as comm:  # a process of one device need not say which
        comm.add_send(np.full(3, jax.process_index(), np.int32), 1 - jax.process_index())
        comm.add_recv(jax.ShapeDtypeStruct((3,), np.int32), 1 - jax.process_index())
        np.testing.assert_array_equal(comm.execute()[0], [1 - jax.process_index()] * 3)
    message = Message(mesh.size - 1, 0, np.arange(5, dtype=np.int32))
    with communicator(mesh, "host") as comm:
        if survives:
            comm._processes._timeout_s = 4.0  # both are here by now
            with pytest.raises(RuntimeError, match="transfer: not all bytes of a round came within timeout_s=4"):
                check_messages(comm, [message])
            comm._processes._timeout_s = 20.0
            distributed.global_state.client.key_value_set("gave_up", "")
        else:
            with pytest.MonkeyPatch.context() as patched, pytest.raises(ZeroDivisionError):
                patched.setattr(comm._mover, "fill", lambda *_: 1 // 0)
                check_messages(comm, [message])
            distributed.global_state.client.blocking_key_value_get("gave_up", 60_000)
        check_messages(comm, [message])
    comm = communicator(mesh, "peer", timeout_s=4.0)
    if not survives:
        comm._mover.fill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerTimeoutError, match=r"rank \d waited 4 s for rank \d"):
        check_messages(comm, [message])
    os._exit(0)


def main() -> None:
    task = json.loads(sys.argv[1])
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.distributed.initialize(
        f"localhost:{task['port']}",
        task["num_processes"],
        task["process"],
        local_device_ids=task.get("local_device_ids"),
    )
    implementation = task["implementation"]
    mesh = suite.make_mesh(implementation, len(suite.devices_of(implementation)))
    if task["scenario"] == "all":
        check_all(mesh, implementation)
    else:
        dict(lost=check_lost, absence=check_absence)[task["scenario"]](mesh)


if __name__ == "__main__":
    main()
