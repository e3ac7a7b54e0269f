"""What this machine can do at best, measured in the run that is compared with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import _ffi
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import Ceilings, first_line
from jax_ep.bench.timing import OUR_CALLS, compile_chain, measure, seconds

_REPEATS = 7
_COPY_BYTES = {"gpu": 512 << 20, "cpu": 32 << 20}
_STORED_BYTES = 1 << 30
_FLAG_ROUNDS = 200, 2000


def names(on_gpus: bool) -> list[str]:
    return ["copy", "stores to peers", "flag round trip"] if on_gpus else ["copy"]


def measure_ceilings(problem: Problem) -> Iterator[Ceilings]:
    """After each measurement, all that is known so far."""
    on_gpus = problem.mesh.devices.flat[0].platform == "gpu"
    measured: dict[str, float | None] = {}
    errors: dict[str, str] = {}
    for name in names(on_gpus):
        fn = {"copy": _copy_rate, "stores to peers": _store_rate, "flag round trip": _flag_round_trip}[name]
        try:
            measured[name] = fn(problem)
        except Exception as error:  # a ceiling that cannot be measured must not end the run
            errors[name] = first_line(error)
        yield Ceilings(measured.get("copy"), measured.get("stores to peers"), measured.get("flag round trip"), errors)


def _copy_rate(problem: Problem) -> float:
    """Bytes per second, read and written, by a program that does nothing else."""
    platform = problem.mesh.devices.flat[0].platform
    rows = _COPY_BYTES.get(platform, _COPY_BYTES["cpu"]) // problem.row_bytes
    source = problem.random((problem.num_ranks * rows, problem.workload.hidden_size), seed=3)
    times = measure(lambda source: -source, problem.mesh, source)
    return 2 * rows * problem.row_bytes / min(times.samples)


def _store_rate(problem: Problem) -> float | None:
    """Bytes per second that leave each GPU while all store to all others.

    In a steady state, like the ops: a GPU that was idle a moment ago stores more slowly.
    """
    if problem.num_ranks == 1:
        return None
    each = problem.workload.num_tokens * (problem.num_ranks - 1) * problem.row_bytes
    repeats = max(1, _STORED_BYTES // each)
    comm_id = np.int64(problem.comm._spec.communicator_id)

    def stores(x):
        result = _ffi._result((1,), jnp.int32, x)
        return jax.ffi.ffi_call("jax_ep_ceiling_stores", result)(x, comm=comm_id, repeats=np.int64(repeats))

    times = measure(stores, problem.mesh, problem.x, marker=OUR_CALLS, calls_each=1)
    problem.comm.check()
    return repeats * each / min(times.samples)


def _flag_round_trip(problem: Problem) -> float | None:
    """Seconds for a flag to a peer's memory and one back."""
    if problem.num_ranks == 1:
        return None
    comm_id = np.int64(problem.comm._spec.communicator_id)

    def flags(rounds: int) -> Callable:
        def fn(x):
            result = _ffi._result((1,), jnp.int32, x)
            return jax.ffi.ffi_call("jax_ep_ceiling_flags", result)(x, comm=comm_id, rounds=np.int64(rounds))

        return fn

    return _slope(problem, flags, problem.shard(np.zeros(problem.num_ranks, np.int32)), *_FLAG_ROUNDS)


def _slope(problem: Problem, program_of: Callable, x, few: int, many: int) -> float:
    """Seconds per repeat, without what a program costs by itself."""

    def median_seconds(repeats: int) -> float:
        compiled = compile_chain(program_of(repeats), problem.mesh, x, (), 1)
        seconds(lambda: compiled((x,), ()))
        return statistics.median(seconds(lambda: compiled((x,), ())) for _ in range(_REPEATS))

    slope = (median_seconds(many) - median_seconds(few)) / (many - few)
    problem.comm.check()
    if slope <= 0:
        raise RuntimeError(f"{many} repeats took no longer than {few}")
    return slope
