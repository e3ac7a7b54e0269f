"""Times experts that move between ranks: `jax_ep.eplb.transfer_experts`, its parts, and the same in stock JAX."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ep.bench.problem import on_host
from jax_ep.bench.results import Row, Times, first_line
from jax_ep.bench.timing import AXIS, agreed_maximum
from jax_ep.bench.verify import WrongResult
from jax_ep.eplb import EplbCommunicator, transfer_experts
from jax_ep.eplb._plan import plan_transfer

_REPEATS = 5
_GIGABYTES = {"gpu": 8.0}
_GIGABYTES_ELSEWHERE = 0.05
_INTERMEDIATE_SIZE = {"gpu": 2048}
_INTERMEDIATE_SIZE_ELSEWHERE = 256
# Of a device's memory, for the experts it holds: the new ones are there as well, and in stock JAX a copy of all ranks'.
_MEMORY_SHARE = 1 / 8
NUM_ROWS = 4


class _Experts(NamedTuple):
    """Weights `[P, ...]`, bfloat16, of which half go to another rank."""

    mesh: Mesh
    params: dict[str, jax.Array]
    old: np.ndarray  # [P]
    new: np.ndarray  # [P]
    bytes_from_rank: int


def measure_transfer(mesh: Mesh, hidden_size: int, gigabytes: float) -> Iterator[Row]:
    """`gigabytes` over all links together; 0 for a default."""
    experts = _make_experts(mesh, hidden_size, gigabytes)
    want = _gather(experts)(experts.params)
    with EplbCommunicator(mesh, axis_name=AXIS) as best:
        name = f'transfer_experts, "{best.transport}"'
        yield _row(name, lambda params: transfer_experts(params, experts.old, experts.new, best), experts, want)
        yield _row("its programs alone", _without_planning(experts, best), experts, want)
    with EplbCommunicator(mesh, axis_name=AXIS, transport="xla") as stock:
        name = 'transfer_experts, "xla"'
        yield _row(name, lambda params: transfer_experts(params, experts.old, experts.new, stock), experts, want)
    yield _row("jnp.take of sharded arrays", _gather(experts), experts, want)


def _make_experts(mesh: Mesh, hidden_size: int, gigabytes: float) -> _Experts:
    platform, num_ranks = mesh.devices.flat[0].platform, mesh.shape[AXIS]
    intermediate = _INTERMEDIATE_SIZE.get(platform, _INTERMEDIATE_SIZE_ELSEWHERE)
    shapes = dict(gate=(hidden_size, intermediate), up=(hidden_size, intermediate), down=(intermediate, hidden_size))
    expert_bytes = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    wanted = (gigabytes or _GIGABYTES.get(platform, _GIGABYTES_ELSEWHERE)) * 1e9
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 2**34)
    (limit,) = (-value for value in agreed_maximum([-limit], mesh))
    moving = max(1, int(min(wanted / num_ranks, _MEMORY_SHARE * limit / 2) / expert_bytes))
    old = np.arange(2 * moving * num_ranks)
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    params = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        make = jax.jit(
            lambda key, shape=shape: jax.random.normal(key, (len(old), *shape), jnp.bfloat16), out_shardings=sharding
        )
        params[name] = make(jax.random.key(seed))
    return _Experts(mesh, params, old, _next_placement(old, num_ranks), moving * expert_bytes if num_ranks > 1 else 0)


def _next_placement(old: np.ndarray, num_ranks: int) -> np.ndarray:
    """Every second slot gets the expert of another rank's, evenly from all of them."""
    new = old.reshape(num_ranks, -1).copy()
    for i in range(1, new.shape[1], 2):
        new[:, i] = np.roll(new[:, i], 1 + i // 2 % max(1, num_ranks - 1))
    return new.reshape(-1)


def _gather(experts: _Experts) -> Callable:
    """In stock JAX. Slots hold the experts of their own number at first."""
    index = experts.new.astype(np.int32)

    def take(params):
        return {name: jnp.take(array, index, axis=0) for name, array in params.items()}

    shardings = {name: array.sharding for name, array in experts.params.items()}
    return jax.jit(take, out_shardings=shardings)


def _without_planning(experts: _Experts, communicator: EplbCommunicator) -> Callable:
    plan = plan_transfer(experts.old[None], experts.new[None], communicator.num_ranks)

    def run(params):
        return {name: communicator._mover.fill(array, plan, 1)[0] for name, array in params.items()}

    return run


def _row(name: str, run: Callable, experts: _Experts, want) -> Row:
    times, error = None, None
    try:
        out = jax.block_until_ready(run(experts.params))
        if want is not None:
            wrong = int(on_host(_num_different(out, want)))
            if wrong:
                raise WrongResult(f"{name}: {wrong} of {sum(a.size for a in want.values())} elements are wrong")
        del out
        samples = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(run(experts.params))
            samples.append(time.perf_counter() - start)
        times = Times(agreed_maximum(samples, experts.mesh))
    except Exception as failure:  # the other rows are worth having
        error = first_line(failure)
    return Row(name, times, error, link_bytes=experts.bytes_from_rank)


@jax.jit
def _num_different(got, want):
    def bits(array):
        return jax.lax.bitcast_convert_type(array, jnp.uint16)

    return sum(jnp.sum(bits(got[name]) != bits(want[name]), dtype=jnp.int32) for name in want)
