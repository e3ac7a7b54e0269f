"""One process of a test across processes: `python worker.py TASK`, see `test_processes.py`.

Every process draws all data from one seed and checks what it holds itself. It ends with exit status 0 if all is well.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import suite
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from suite import EXPERT_MAJOR, FLAT, LOW_LATENCY, QUANTS, RANK_MAJOR, Case

from jax_ep import PeerTimeoutError, _bootstrap, _ffi
from jax_ep.eplb import ExpertPlacement, LoadRecorder, count_moves, rebalance_experts


@dataclasses.dataclass(frozen=True)
class Task:
    scenario: str
    implementation: str
    process: int
    num_processes: int
    port: int
    local_device_ids: list[int] | None = None


def all_ranks_mesh(task: Task):
    return suite.make_mesh(task.implementation, len(suite.devices_of(task.implementation)))


def check_suite(task: Task) -> None:
    """The shared checks, on one group of all devices and on independent groups."""
    mesh = all_ranks_mesh(task)
    num_ranks = mesh.size
    cases = [
        Case(num_ranks, num_tokens=21, topk=5, expert_alignment=4),
        Case(num_ranks, num_tokens=13, topk=3, layout=RANK_MAJOR, dtype="bfloat16", check_vma=False),
        Case(num_ranks, num_tokens=30, routing="skewed", capacity=40, overflow="drop", weighted=False),
        Case(num_ranks, num_tokens=19, topk=4, mode=LOW_LATENCY, layout=EXPERT_MAJOR, hidden_size=128, quant=QUANTS[1]),
    ]
    layouts = [EXPERT_MAJOR]
    if task.implementation == "cuda":  # which alone has code of this mode for the other layouts, and of halves
        cases.append(Case(num_ranks, num_tokens=11, mode=LOW_LATENCY, layout=RANK_MAJOR))
        cases += [dataclasses.replace(case, max_requests=1) for case in (cases[0], cases[3])]
        layouts.append(FLAT)
    for case in cases:
        suite.check_case(task.implementation, case, mesh)
    for layout in layouts:
        case = Case(num_ranks, mode=LOW_LATENCY, layout=layout, hidden_size=128, dtype="bfloat16")
        suite.check_quantised(task.implementation, case, mesh)
    programs.check_scan(task.implementation, mesh, dataclasses.replace(cases[0], max_requests=1))
    programs.check_many_branches(task.implementation, mesh, num_branches=8, times=3)
    if num_ranks == 4:
        for ep_first in (False, True):
            groups = suite.make_mesh(task.implementation, 2, dp=2, ep_first=ep_first)
            suite.check_case(task.implementation, Case(num_ranks=2), groups)


def check_refusals(task: Task) -> None:
    """Communicators that cannot be built, each refused on every process; and good ones afterwards."""
    mesh = all_ranks_mesh(task)
    case = Case(num_ranks=mesh.size)
    check_different_arguments(task, mesh, case)
    check_absent_process(task, mesh, case)
    check_one_process_alone_fails(task, mesh, case)
    written = dict(dtype="float32", timeout_s=20) if task.process else dict(dtype=np.float32, timeout_s=20.0)
    suite.communicator(task.implementation, mesh, case, **written).destroy()
    check_different_hosts(task, mesh, case)
    suite.run(task.implementation, mesh, case)


def check_different_arguments(task: Task, mesh, case: Case) -> None:
    with pytest.raises(RuntimeError, match="were given different arguments: .*topk=.* and .*topk="):
        suite.communicator(task.implementation, mesh, dataclasses.replace(case, topk=2 + task.process))


def check_absent_process(task: Task, mesh, case: Case) -> None:
    """One that comes too late meets the others where they try again."""
    client = distributed.global_state.client
    if task.process == 0:
        text = r"MoECommunicator: not all of processes \[0, 1\] called it within timeout_s=1"
        with pytest.raises(RuntimeError, match=text):
            suite.communicator(task.implementation, mesh, case, timeout_s=1.0)
        client.key_value_set("gave_up", "")
    else:
        client.blocking_key_value_get("gave_up", 60_000)
    suite.check_case(task.implementation, case, mesh)


def check_one_process_alone_fails(task: Task, mesh, case: Case) -> None:
    """What keeps one process from making its part is an error on both, at once."""

    def fails_with(error):
        def fails(*_, **__):
            raise error

        return fails

    start = time.monotonic()
    for module, name, error in (
        (_ffi.extension(task.implementation), "Communicator", MemoryError()),
        (_ffi, "extension", NotImplementedError("no extension")),
    ):
        kind = NotImplementedError if isinstance(error, NotImplementedError) else RuntimeError
        text = rf"^{str(error) or 'MemoryError'}, on process 1$"
        with pytest.MonkeyPatch.context() as patched, pytest.raises(kind, match=text):
            if task.process == 1:
                patched.setattr(module, name, fails_with(error))
            suite.communicator(task.implementation, mesh, case, timeout_s=60.0)
    assert time.monotonic() - start < 30


def check_different_hosts(task: Task, mesh, case: Case) -> None:
    """Two hosts cannot share a group, but each may have its own."""
    identity = _bootstrap.host_identity
    _bootstrap.host_identity = lambda: f"host of process {task.process}"
    half = mesh.size // 2
    ranks = [list(range(half)), list(range(half, mesh.size))]
    text = rf"nothing connects ranks \{ranks[0]} \(process 0\) and ranks \{ranks[1]} \(process 1\): .*different hosts"
    with pytest.raises(RuntimeError, match=text):
        suite.communicator(task.implementation, mesh, case)
    if half > 1:
        suite.check_case(
            task.implementation, Case(num_ranks=half), suite.make_mesh(task.implementation, num_ranks=half, dp=2)
        )
    _bootstrap.host_identity = identity


def check_killed_peer(task: Task) -> None:
    """The last process dies while the others wait for it: they get an error in time, and can clean up."""
    mesh, timeout_s = all_ranks_mesh(task), 5.0
    case = Case(num_ranks=mesh.size)
    comm = suite.communicator(task.implementation, mesh, case, timeout_s=timeout_s)
    inputs = suite.place(suite.draw(case), mesh, comm.capacity)

    # No collectives but ours: stock ones have no timeout of seconds.
    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("ep"),) * 4, out_specs=P("ep"))
    def layer(*arguments):
        return suite.moe(comm, *arguments)[0]

    arguments = inputs.x, inputs.topk_ids, inputs.weights, inputs.scale
    jax.block_until_ready(layer(*arguments))
    survivors = list(range(task.num_processes - 1))
    if task.process not in survivors:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    last_ranks = [rank for rank, device in enumerate(mesh.devices) if device.process_index == task.num_processes - 1]
    text = rf"rank \d waited {timeout_s:g} s for rank ({'|'.join(map(str, last_ranks))}) in "
    try:
        out = jax.block_until_ready(layer(*arguments))
        assert all(np.isnan(part).all() for _, part in suite.local(out))
    except jax.errors.JaxRuntimeError as error:
        assert "waited" in str(error), error
    for _ in range(2):
        with pytest.raises(PeerTimeoutError, match=text):
            comm.check()
    assert time.monotonic() - start < timeout_s + 5
    comm.destroy()
    # The process that coordinates leaves last, and none waits for the dead one.
    distributed.global_state.client.wait_at_barrier("survived", 60_000, process_ids=survivors)
    time.sleep(1.0 if task.process == 0 else 0.0)
    os._exit(0)


def check_rebalancing(task: Task) -> None:
    mesh = suite.make_mesh(task.implementation, len(jax.devices()), axis_type=AxisType.Auto)
    check_routing_through_placements(task, mesh)
    check_layer_that_rebalances(task, mesh)


def check_routing_through_placements(task: Task, mesh) -> None:
    """Against the experts one by one, and the load that was recorded; of full slots, and of some empty ones."""
    num_experts, num_slots, tokens, hidden = 5, 4 * mesh.size, 6 * mesh.size, 16
    rng = np.random.default_rng(0)
    topk_ids = rng.choice(num_experts, (tokens, 2), p=[0.6, 0.1, 0.1, 0.1, 0.1]).astype(np.int32)
    x, factors = (rng.normal(size=(rows, hidden)).astype(np.float32) for rows in (tokens, num_experts))
    weights = rng.random((tokens, 2), np.float32)
    wanted = x * (weights[..., None] * factors[topk_ids]).sum(1)
    load = np.bincount(topk_ids.reshape(-1), minlength=num_experts)
    recorder, case = LoadRecorder(num_experts), Case(mesh.size, num_tokens=6, num_experts=num_slots)
    with suite.communicator(task.implementation, mesh, case) as comm:

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=(*[P("ep")] * 4, P(), P()), out_specs=(P("ep"), P()))
        def step(x, topk_ids, weights, factors, placement, window):
            out, handle = comm.dispatch(x, topk_ids, weights, placement=placement)
            y = comm.combine(suite.apply_experts(out, factors), handle)
            return y, recorder.record(window, handle, placement)

        tokens = [suite.put(array, mesh, P("ep")) for array in (x, topk_ids, weights)]
        window = recorder.init(2)
        planned = rebalance_experts(load[None], num_slots, 1, 1, mesh.size).physical_to_logical[0]
        for slots in (planned, [*range(num_experts), *[-1] * (num_slots - num_experts)]):
            placement = ExpertPlacement.from_slots(slots, num_experts)
            y, window = step(*tokens, suite.put(factors[slots], mesh, P("ep")), placement, window)
            for index, part in suite.local(y):
                np.testing.assert_allclose(part, wanted[index], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(window, [load, load])
        comm.check()


def check_layer_that_rebalances(task: Task, mesh) -> None:
    """With Adam, every second step: experts and moments move bit for bit, and so do their replicas."""
    import optax
    from flax import nnx

    from jax_ep.nn import MoE, Router

    num_experts, hidden, every = 6, 16, 2
    case = Case(mesh.size, num_tokens=8, num_experts=4 * mesh.size, hidden_size=hidden)
    comm = suite.communicator(task.implementation, mesh, case)

    @nnx.jit
    def create():
        rngs = nnx.Rngs(0)
        router = Router(hidden, num_experts, 2, selection_bias=True, rngs=rngs)
        router.bias[...] = jnp.array([0.0, 0, 0, 0, 9, 9])  # nearly all tokens to the last two
        layer = MoE(router, 8, communicator=comm, num_slots=4 * mesh.size, load_window=every, rngs=rngs)
        # Moments alone, and the same outputs in each step.
        return layer, nnx.Optimizer(layer, optax.adam(0.0), wrt=nnx.Param)

    layer, optimizer = create()
    x = suite.put(np.random.default_rng(0).normal(size=(8 * mesh.size, hidden)).astype(np.float32), mesh, P("ep"))

    @nnx.jit
    def step(layer, optimizer, x):
        def loss(layer):
            y, aux = layer(x)
            return jnp.square(y - x).mean(), (y, aux)

        (_, (y, aux)), gradients = nnx.value_and_grad(loss, has_aux=True)(layer)
        optimizer.update(layer, gradients)
        layer.record_load(aux)
        return y

    def by_expert() -> tuple[np.ndarray, dict]:
        slots = np.asarray(layer.slots[...])
        for theirs in multihost_utils.process_allgather(slots):
            np.testing.assert_array_equal(theirs, slots)
        adam = optimizer.opt_state[0]
        trees = dict(kernels=nnx.state(layer, nnx.Param), mu=adam.mu, nu=adam.nu)
        arrays = {(kind, name): tree[name][...] for kind, tree in trees.items() for name in ("gate", "up", "down")}
        arrays = {name: multihost_utils.process_allgather(array, tiled=True) for name, array in arrays.items()}
        first = np.array([np.flatnonzero(slots == expert)[0] for expert in range(num_experts)])
        for array in arrays.values():
            assert array.any()
            np.testing.assert_array_equal(array[first][slots], array)
        return slots, {name: array[first] for name, array in arrays.items()}

    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        step(layer, optimizer, x)
        assert layer.rebalance(optimizer, every=every, slack=None) == 0
        outputs = list(suite.local(step(layer, optimizer, x)))
        old, before = by_expert()
        moves = layer.rebalance(optimizer, every=every, slack=None)
        new, after = by_expert()
        assert 0 < moves == count_moves(old[None], new[None], mesh.size)[0]
        jax.tree.map(np.testing.assert_array_equal, after, before)
        for (_, got), (_, want) in zip(suite.local(step(layer, optimizer, x)), outputs, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        by_expert()
    comm.check()
    comm.destroy()


SCENARIOS = dict(
    suite=check_suite, refusals=check_refusals, rebalancing=check_rebalancing, killed_peer=check_killed_peer
)


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.distributed.initialize(
        f"localhost:{task.port}", task.num_processes, task.process, local_device_ids=task.local_device_ids
    )
    SCENARIOS[task.scenario](task)


if __name__ == "__main__":
    main()
