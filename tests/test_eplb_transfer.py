"""Arrays and experts arrive bit for bit, by every transport, in one process and in several."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import signal
import time
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
import test_bench
import test_processes
from eplb_worker import (
    BUDGET_BYTES,
    DTYPES,
    ROW_BYTES,
    Message,
    check_messages,
    check_transfer,
    check_unmatched,
    communicator,
    draw_messages,
    draw_placement,
    random_bits,
)
from jax._src.lib import _jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ep._processes import Processes
from jax_ep.bench import transfer as bench_transfer
from jax_ep.eplb import EplbCommunicator, count_moves, create_eplb_communicator, transfer_experts
from jax_ep.eplb._peer import tables_of
from jax_ep.eplb._plan import MoveTables, balanced, plan_transfer
from jax_ep.eplb._rounds import rounds_of
from jax_ep.eplb._rows import _get, _put, rows_per_slot

TRANSPORTS = ["peer", "xla", "host"]


@pytest.fixture(params=TRANSPORTS)
def connect(request, native_implementation):
    """`connect(num_ranks, **arguments)`: a communicator."""
    made = []

    def connect(num_ranks: int, mesh=None, **arguments) -> EplbCommunicator:
        num_ranks = suite.num_ranks_at_most(native_implementation, num_ranks)
        mesh = suite.make_mesh(native_implementation, num_ranks) if mesh is None else mesh
        made.append(communicator(mesh, request.param, native_implementation, **arguments))
        return made[-1]

    yield connect
    for comm in made:
        comm.destroy()


# ---- arrays ----


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_messages(connect, num_ranks):
    comm, rng = connect(num_ranks), np.random.default_rng(num_ranks)
    check_messages(comm, draw_messages(rng, comm.num_ranks, 5))
    check_messages(comm, [])


@hypothesis.settings(max_examples=3)
@hypothesis.given(data=st.data())
def test_drawn_messages(connect, data):
    comm = connect(4)
    rank = st.integers(0, comm.num_ranks - 1)
    pairs = data.draw(st.lists(st.tuples(rank, rank), max_size=6))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    # Few shapes, since each makes a program.
    check_messages(comm, [Message(*pair, random_bits(rng, (37,), "bfloat16")) for pair in pairs])


def check_every_bit(comm: EplbCommunicator) -> None:
    """All values of 16 bits, and of the other types random bits."""
    last, rng = comm.num_ranks - 1, np.random.default_rng(0)
    words = np.arange(2**16, dtype=np.uint16)
    nans = np.concatenate([words.astype(np.uint32) | 0x7F800000, words.astype(np.uint32)])  # and subnormal numbers
    arrays = [words.view(jnp.bfloat16), words.view(np.float16), nans.view(np.float32), nans.view(np.complex64)]
    arrays += [random_bits(rng, (4099,), dtype) for dtype in DTYPES]
    with jax.enable_x64(True):
        arrays += [random_bits(rng, (515,), dtype) for dtype in (np.float64, np.int64, np.complex128)]
        for i, array in enumerate(arrays):
            comm.add_send(array, last, i % 2 * last)
            comm.add_recv(array, i % 2 * last, last)
        # Received in the order of add_recv, whatever the order of their sources.
        for array, got in zip(arrays, comm.execute(), strict=True):
            assert got.dtype == array.dtype and np.asarray(got).tobytes() == array.tobytes()


def test_every_bit(connect):
    check_every_bit(connect(2, row_bytes=4096, memory_budget_bytes=1 << 20))


def test_reference(native_implementation):
    """The kernels' oracle moves bits too, wherever there are no kernels."""
    mesh = suite.make_mesh(native_implementation, suite.num_ranks_at_most(native_implementation, 2))
    with communicator(mesh, "peer", "reference", row_bytes=4096, memory_budget_bytes=1 << 20) as comm:
        check_every_bit(comm)
        check_transfer(comm, np.random.default_rng(0), tails={"bfloat16": (5, 31)})


def test_unmatched_and_then_again(connect):
    comm = connect(4)
    check_unmatched(comm)
    check_messages(comm, draw_messages(np.random.default_rng(3), comm.num_ranks, 2))


def test_ranks_are_implied_by_devices(native_implementation):
    mesh = suite.make_mesh(native_implementation, suite.num_ranks_at_most(native_implementation, 2))
    last, devices = mesh.size - 1, mesh.devices
    with create_eplb_communicator(mesh, "xla") as comm:
        sent = jax.device_put(np.arange(3, dtype=np.float32), devices[last])
        comm.add_send(sent, 0)
        comm.add_recv(jax.device_put(sent, devices[0]), last)
        (got,) = comm.execute()
        np.testing.assert_array_equal(got, sent)
        assert got.devices() == {devices[0]}


def test_arguments(native_implementation):
    mesh = suite.make_mesh(native_implementation, 1)
    with EplbCommunicator(mesh, transport="xla") as comm:
        for array, error, text in [
            (1.0, TypeError, "array: expected an array, got float"),
            (jax.ShapeDtypeStruct((3,), np.float32), TypeError, "array: expected an array, got ShapeDtypeStruct"),
            (jax.random.key(0), ValueError, "array: expected a dtype of numbers, or bool, got key"),
            (np.zeros(3), ValueError, "array: expected dtype float32, or jax_enable_x64, got float64"),
        ]:
            with pytest.raises(error, match=text):
                comm.add_send(array, 0)
        with pytest.raises(TypeError, match="like: expected an array or a jax.ShapeDtypeStruct, got list"):
            comm.add_recv([], 0)
        with pytest.raises(ValueError, match="dst_rank: expected a rank below 1, got 1"):
            comm.add_send(np.zeros(3, np.float32), 1)
        for add, argument in ((comm.add_send, "array"), (comm.add_recv, "like")):
            with pytest.raises(
                TypeError, match=f"{argument}: expected a concrete array, got a tracer; call it outside"
            ):
                jax.jit(lambda x, add=add: add(x, 0))(np.zeros(3, np.float32))
        deleted = jnp.zeros(3)
        comm.add_send(deleted, 0)
        deleted.delete()
        with pytest.raises(
            ValueError, match=r"array: expected float32\[3\] from rank 0 to rank 0, got one that was del"
        ):
            comm.execute()
        assert comm.execute() == []
        comm.add_send(np.arange(3, dtype=">f4"), np.int64(0), np.int32(0))
        comm.add_recv(np.zeros(3, np.float32), np.int64(0), np.int32(0))
        np.testing.assert_array_equal(comm.execute()[0], [0, 1, 2])
    for arguments, text in [
        (dict(transport="peer", memory_budget_bytes=8192), "memory_budget_bytes: expected at least 16432 bytes"),
        (dict(transport="tcp"), "transport: expected one of .* got 'tcp'"),
        (dict(row_bytes=24), "row_bytes: expected a multiple of 16, got 24"),
        (dict(memory_budget_bytes=8192), "memory_budget_bytes: expected at least 131200 bytes, got 8192"),
        (dict(axis_name="tp"), "axis_name: expected one of"),
        (dict(timeout_s=0), "timeout_s: expected seconds above 0, got 0"),
        (dict(timeout_s=float("inf")), "timeout_s: expected seconds above 0, got inf"),
        (dict(timeout_s="a"), "timeout_s: expected a number, got str 'a'"),
        (dict(implementation="xla", transport=None), "implementation: expected one of \"cuda\", .* got 'xla'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=text):
            EplbCommunicator(mesh, **dict(transport="xla") | arguments)


def test_numpys_arrays_are_copied(connect):
    comm = connect(1)
    array = np.arange(3, dtype=np.int32)
    comm.add_send(array, 0, 0)
    array[:] = 7
    comm.add_recv(array, 0, 0)
    np.testing.assert_array_equal(comm.execute()[0], [0, 1, 2])


def test_another_list_of_shapes_compiles_nothing(native_implementation):
    rng = np.random.default_rng(0)
    with communicator(suite.make_mesh(native_implementation, 1), "host") as comm:
        compiled = []
        for number in (33, 34, 35):
            arrays = [random_bits(rng, (3 + i % 2,), "int32") for i in range(number)]
            for i, array in enumerate(arrays):
                # Also where numpy's arrays lie between the others.
                comm.add_send(array if i % 3 == 0 and number > 33 else jnp.asarray(array), 0)
                comm.add_recv(array, 0)
            for array, got in zip(arrays, comm.execute(), strict=True):
                np.testing.assert_array_equal(got, array)
            compiled.append([program._cache_size() for program in (_put, _get)])
    assert compiled[0] == compiled[1] == compiled[2]


def test_after_destroy(connect):
    comm = connect(1)
    comm.add_send(np.zeros(3, np.float32), 0, 0)
    comm.destroy()
    comm.destroy()
    slots = np.arange(2)
    params = suite.put(np.ones((2, 3), np.float32), comm.mesh, P("ep"))
    for call, arguments in [
        (comm.add_send, (np.zeros(3, np.float32), 0, 0)),
        (comm.add_recv, (np.zeros(3, np.float32), 0, 0)),
        (comm.execute, ()),
        (transfer_experts, (params, slots, slots, comm)),
    ]:
        text = rf"{call.__name__}: expected a live EplbCommunicator, got one after destroy\(\)"
        with pytest.raises(ValueError, match=text):
            call(*arguments)


def test_which_rank_is_asked_for(native_implementation):
    mesh = suite.make_mesh(native_implementation, 2)
    with EplbCommunicator(mesh, transport="host") as comm:
        text = r"src_rank: expected one of this process's ranks \[0, 1\], or an array on the device of one, got None"
        with pytest.raises(ValueError, match=text):
            comm.add_send(np.zeros(3, np.float32), 1)
    with EplbCommunicator(suite.make_mesh(native_implementation, 1, dp=2), transport="host") as comm:
        with pytest.raises(ValueError, match="mesh: expected no other axis for add_send and add_recv, got"):
            comm.add_send(np.zeros(3, np.float32), 0, 0)


# ---- experts ----


def test_transfer(connect):
    """One shape, many placements."""
    comm = connect(4)
    for seed in range(3):
        check_transfer(comm, np.random.default_rng(seed), donate=seed % 2 == 0)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_transfer_of_one_layer(connect, num_ranks):
    tails = {"float8_e4m3fn": (131,), "complex64": (9,)}
    check_transfer(connect(num_ranks), np.random.default_rng(0), layers=None, tails=tails)


def test_transfer_beside_another_axis(connect, native_implementation):
    """Replicated over the other axis, and split."""
    comm = connect(2, mesh=suite.make_mesh(native_implementation, 2, dp=2, axis_type=AxisType.Auto))
    check_transfer(comm, np.random.default_rng(0), tails={"bfloat16": (6,)})
    check_transfer(comm, np.random.default_rng(1), tails={"bfloat16": (6, 34)}, spec=(None, "dp"))


def program_bytes(comm: EplbCommunicator, params: jax.Array, old: np.ndarray, new: np.ndarray) -> int:
    """What XLA says that a program that moves rows takes on a device besides its arguments and results."""
    plan, mover = plan_transfer(old[None], new[None], comm.num_ranks), comm._mover
    if comm.transport == "peer":
        tables = suite.put(tables_of(plan).pack().reshape(-1), comm.mesh, P("ep"))
        lowered = mover._program(params.sharding, plan.local_source.shape[1], 1).lower(params, tables)
    else:
        per_slot = rows_per_slot(params.shape[1], params.dtype, ROW_BYTES)
        layout, _ = mover._transport.layout(plan.moves.counts(comm.num_ranks) * per_slot)
        counts = np.zeros((comm.num_ranks,) * 2, np.int32)
        step = mover._round(params.sharding, layout, per_slot, 1)
        lowered = step.lower(params, params, list(MoveTables.of(plan.moves, comm.num_ranks)), counts, counts)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_budget(native_implementation, transport):
    """What is taken fits, and there are no more rounds than that makes necessary."""
    num_ranks = suite.num_ranks_at_most(native_implementation, 4)
    mesh = suite.make_mesh(native_implementation, num_ranks)
    size = 16384
    old, new = np.arange(2 * num_ranks), np.roll(np.arange(2 * num_ranks), 2)
    params = suite.put(random_bits(np.random.default_rng(0), (2 * num_ranks, size), "int8"), mesh, P("ep"))
    rounds = []
    for budget in BUDGET_BYTES, 16 * BUDGET_BYTES:
        with communicator(mesh, transport, native_implementation, memory_budget_bytes=budget) as comm:
            transfer_experts(params, old, new, comm)
            if transport == "peer":
                rows, taken = comm._mover.max_rows, comm._mover.comm.arena_bytes
                if native_implementation == "cpu":  # where that is address space, of all ranks
                    taken = 2 * (num_ranks - 1) * rows * ROW_BYTES
            else:
                rows, taken = comm._mover._transport.max_rows, 0
            if transport != "host":  # whose rounds are two programs
                taken += program_bytes(comm, params, old, new)
            assert taken <= budget
            needed = 2 * size / (rows * ROW_BYTES) if num_ranks > 1 else 0
            rounds.append(comm.statistics.num_rounds)
            assert needed <= rounds[-1] <= 1.1 * needed + 1
            # Neighbours send two experts each, and nobody anything else.
            moved = 2 * size * np.roll(np.eye(num_ranks, dtype=int), 1, axis=1) * (num_ranks > 1)
            np.testing.assert_array_equal(comm.statistics.bytes_moved, moved)
            assert comm.statistics.bytes_over_links == 2 * size * num_ranks * (num_ranks > 1)
    assert num_ranks == 1 or rounds[0] > rounds[1]


def test_rounds_are_even():
    rows = np.array([[0, 100, 7], [1, 0, 0], [33, 2, 5]])
    rounds = list(rounds_of(rows, 7))
    np.testing.assert_array_equal(sum(count for _, count in rounds), rows)
    for (first, count), (following, _) in itertools.pairwise(rounds):
        np.testing.assert_array_equal(first + count, following)
        assert (count <= -(-rows // 7)).all()


def test_transfer_without_a_change_copies_nothing(native_implementation):
    mesh = suite.make_mesh(native_implementation, suite.num_ranks_at_most(native_implementation, 2))
    slots = np.arange(4)
    params = dict(weights=suite.put(np.ones((4, 3), np.float32), mesh, P("ep")), step=3)
    got = transfer_experts(params, slots, slots, donate=True)  # with a communicator of its own
    assert got["weights"] is params["weights"] and got["step"] == 3
    got = transfer_experts(params, slots, slots[::-1], donate=True, row_bytes=64, transport="xla")
    assert params["weights"].is_deleted() and not got["weights"].is_deleted()


def test_transfer_arguments(native_implementation):
    mesh = suite.make_mesh(native_implementation, 1)
    weights = suite.put(np.ones((4, 3), np.float32), mesh, P("ep"))
    slots = np.arange(4)
    with EplbCommunicator(mesh, transport="xla") as comm:
        for params, old, new, error, text in [
            (weights, slots, slots[:3], ValueError, r"new: expected shape \[4\], got shape \[3\]"),
            (weights, slots, slots * 1.0, ValueError, "new: expected an integer dtype, got float64"),
            (weights, slots, slots - 2, ValueError, "new: expected experts from 0 on, or -1, got -2"),
            (weights, slots, slots + 1, ValueError, "new: expected experts that are in old, got expert 4 in layer 0"),
            (weights, slots[None, None], slots, ValueError, r"old: expected shape \[P\] or \[layers, P\], got shape"),
            ([weights[:2]], slots, slots, ValueError, r"params\[0\]: expected shape \[4, ...\], got shape \[2, 3\]"),
            ([np.ones(4)], slots, slots, TypeError, r"params\[0\]: expected a jax.Array, got ndarray"),
            (
                {"w": jnp.ones(4)},
                slots,
                slots,
                ValueError,
                r"params\['w'\]: expected dimension 0 sharded over axis 'ep'",
            ),
        ]:
            with pytest.raises(error, match=text):
                transfer_experts(params, old, new, comm)
        with pytest.raises(TypeError, match=r"params\['w'\]: expected a concrete array, got a tracer; call it outside"):
            jax.jit(lambda w: transfer_experts({"w": w}, slots, slots, comm))(weights)
        with pytest.raises(ValueError, match=r"communicator: expected None beside its arguments, got \['transport'\]"):
            transfer_experts(weights, slots, slots, comm, transport="xla")
    with pytest.raises(ValueError, match="params: expected an array sharded over a mesh, or a communicator, got 1"):
        transfer_experts([jnp.ones(4)], slots, slots)


# ---- plans ----


@hypothesis.given(seed=st.integers(0, 999), num_ranks=st.sampled_from([2, 4, 8]))
@hypothesis.settings(max_examples=30)
def test_plan(seed, num_ranks):
    """Every slot gets its expert, by as few moves as there can be, from ranks that hold it."""
    rng, layers, per_rank = np.random.default_rng(seed), 2, 4
    old, new = (draw_placement(rng, layers, per_rank * num_ranks, 2 * num_ranks) for _ in range(2))
    plan = plan_transfer(old, new, num_ranks)
    by_rank = [np.moveaxis(a.reshape(layers, num_ranks, -1), 1, 0).reshape(num_ranks, -1) for a in (old, new)]
    slots = np.where(plan.local_source >= 0, np.take_along_axis(by_rank[0], np.maximum(plan.local_source, 0), 1), -1)
    src_rank, src_slot, dst_rank, dst_slot = plan.moves
    assert (src_rank != dst_rank).all() and (slots[dst_rank, dst_slot] == -1).all()
    slots[dst_rank, dst_slot] = by_rank[0][src_rank, src_slot]
    if plan.copies is not None:
        slots = np.take_along_axis(slots, plan.copies, axis=1)
    np.testing.assert_array_equal(slots, by_rank[1])
    # A rank that needs an expert twice fetches it once.
    distinct = {(*where, expert) for where, expert in np.ndenumerate(new.reshape(layers, num_ranks, -1))}
    wanted = {(layer, rank, expert) for layer, rank, _, expert in distinct if expert >= 0}
    held = {(*where[:2], expert) for where, expert in np.ndenumerate(old.reshape(layers, num_ranks, -1))}
    assert len(src_rank) == len(wanted - held)
    if (new >= 0).all():
        assert len(src_rank) <= count_moves(old, new, num_ranks).sum()


@hypothesis.given(
    choices=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True), min_size=1, max_size=6)
)
@hypothesis.settings(max_examples=60)
def test_senders_are_balanced(choices):
    chosen = balanced(np.array([np.isin(np.arange(4), ranks) for ranks in choices]))
    assert all(rank in ranks for rank, ranks in zip(chosen, choices, strict=True))
    best = min(np.bincount(picked).max() for picked in itertools.product(*choices))
    assert np.bincount(chosen).max() == best


# ---- the benchmark's rows ----


def test_benchmark(tmp_path):
    file = tmp_path / "out.json"
    output = test_bench.run_bench("--devices", 2, "--transfer", 0.001, "--json", file)
    rows = [summary["row"] for summary in json.loads(file.read_text())["rows"]]
    assert [row["error"] for row in rows] == [None] * bench_transfer.NUM_ROWS
    assert all(row["link_bytes"] == 5 * 98304 for row in rows)  # of either rank
    for text in ('transfer_experts, "peer"', "its programs alone", "jnp.take", "of stores"):
        assert text in output


def test_benchmark_finds_wrong_results(native_implementation, monkeypatch):
    num_ranks = suite.num_ranks_at_most(native_implementation, 2)
    mesh = suite.make_mesh(native_implementation, num_ranks, axis_type=AxisType.Auto)
    monkeypatch.setattr(bench_transfer, "transfer_experts", lambda params, *_: params)
    row = next(bench_transfer.measure_transfer(mesh, 64, 0.001))
    assert num_ranks == 1 or "elements are wrong" in row.error


# ---- several processes ----


@pytest.fixture(scope="module")
def clients():
    """Of the key-value store: three, as if they were processes."""
    address, clients = f"localhost:{test_processes.free_port()}", []
    service = _jax.get_distributed_runtime_service(address, 3)
    for me in range(3):
        clients.append(_jax.get_distributed_runtime_client(address, me, shutdown_on_destruction=False))
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda client: client.connect(), clients))
        yield clients
        list(threads.map(lambda client: client.shutdown(), clients))
    service.shutdown()


def together(calls: list) -> list:
    """What each returns, or the error that it raises, in a thread of its own."""

    def outcome(call):
        try:
            return call()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(outcome, calls))


def test_calls_that_miss_each_other(clients):
    """Whoever called how often alone, and gave up whenever: all who return have the same, and the next call works."""
    number, rng = 12, np.random.default_rng(0)
    groups = [[Processes([0, 1, 2], me, clients[me], f"miss {i}", 0.2) for me in range(3)] for i in range(number)]

    def calls(processes, delays, text):
        said = []
        for i, delay in enumerate(delays):
            time.sleep(delay)
            try:
                said.append(processes.share("call", f"{text} {i} of {processes._me}".encode()))
            except RuntimeError as error:
                assert "call: not all of processes [0, 1, 2] called it within timeout_s=0.2" in str(error)
        return said

    delays = [[rng.uniform(0, 1, rng.integers(3)) for _ in range(3)] for _ in range(number)]
    early = together(
        [
            functools.partial(calls, processes, delay, "early")
            for group, waits in zip(groups, delays, strict=True)
            for processes, delay in zip(group, waits, strict=True)
        ]
    )
    assert all(early[3 * i] == early[3 * i + 1] == early[3 * i + 2] for i in range(number))
    members = [processes for group in groups for processes in group]
    for processes in members:
        processes._timeout_s = 20.0
    for text in ("then", "and again"):
        outcomes = together([functools.partial(calls, processes, [0], text) for processes in members])
        assert outcomes == [[{me: f"{text} 0 of {me}".encode() for me in range(3)}]] * 3 * number


def test_what_processes_tell_each_other(clients):
    group, other = ([Processes([0, 1, 2], me, clients[me], name, 20.0) for me in range(3)] for name in ("one", "two"))

    def share(group, whats=("call",) * 3, problems=(None,) * 3):
        return together([functools.partial(group[me].share, whats[me], b"\n%d" % me, problems[me]) for me in range(3)])

    texts = {me: b"\n%d" % me for me in range(3)}
    for whats, problems, text in [
        (("call", "call", "other"), (None,) * 3, "processes 0 and 2 are in different calls: call, other"),
        (("call",) * 3, (None, TypeError("x: wrong"), ValueError("y: wrong")), "x: wrong, on process 1"),
        (("call",) * 3, (ValueError("x: wrong"),) * 3, "x: wrong"),
    ]:
        outcomes = share(group, whats, problems)
        kind = TypeError if "on process" in text else ValueError
        assert [(type(error), str(error)) for error in outcomes] == [(kind, text)] * 3
        assert share(group) == [texts] * 3
    # Process 0 is slow to read what was said, and others go on: one share or two.
    read = clients[0].key_value_dir_get_bytes

    def read_slowly(place):
        time.sleep(0.1)
        return read(place)

    def read_late(place):
        return [(key, b"%d\n%s" % (int(said.split(b"\n")[0]) + 2, said)) for key, said in read(place)]

    def slowed(read):
        others = {name: getattr(clients[0], name) for name in ("key_value_set_bytes", "wait_at_barrier")}
        return types.SimpleNamespace(key_value_dir_get_bytes=read, **others)

    group[0]._client = slowed(read_slowly)
    twice = [lambda p=p: [p.share("call", b"%d" % i) for i in range(2)] for p in group]
    assert together(twice) == [[dict.fromkeys(range(3), b"%d" % i) for i in range(2)]] * 3
    group[0]._client = slowed(read_late)
    late, *others = share(group)
    assert str(late) == "call: not all of processes [0, 1, 2] called it within timeout_s=20.0" and others == [texts] * 2
    group[0]._client = clients[0]
    assert share(group) == [texts] * 3
    # What is left is deleted by the next who meet.
    for processes in group:
        processes.close()
    assert read("jax_ep/one/said/0") and share(other) == [texts] * 3
    assert read("jax_ep/eplb/one") == []


@pytest.fixture
def run_processes(native_implementation, tmp_path, monkeypatch):
    """Runs a scenario of `eplb_worker.py` in processes, and expects their statuses."""
    monkeypatch.setattr(test_processes, "WORKER", test_processes.WORKER.with_name("eplb_worker.py"))

    def run(scenario: str, devices_each: int, statuses: list[int]) -> None:
        ended = test_processes.run_processes(tmp_path, scenario, native_implementation, len(statuses), devices_each)
        test_processes.assert_ended(ended, statuses)

    return run


def test_across_processes(run_processes):
    run_processes("all", 2, [0, 0])


def test_absent_process(run_processes):
    run_processes("absence", 1, [0, 0, 0])


def test_lost_process(run_processes):
    run_processes("lost", 1, [0, -signal.SIGKILL])
