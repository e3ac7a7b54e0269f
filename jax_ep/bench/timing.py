"""Steady-state time of an op: many calls chained inside one program, with nothing between them, repeated."""

from __future__ import annotations

import collections
import math
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ep.bench.results import Times

AXIS = "ep"
# What a program's calls are known by in its compiled text.
OUR_CALLS = r'custom_call_target="jax_ep_'
COLLECTIVES = r" (?:ragged-all-to-all|all-to-all|all-gather)(?:-start)?\("

_REPEATS = 7
_MAX_CALLS = 16
_SECONDS_PER_PROGRAM = 0.05
_SECONDS_PER_SAMPLE = 0.05
# Programs in flight on GPUs, so that the time to start one is hidden.
_AHEAD = 2
# Of a device's memory, for the results of the calls of one program.
_RESULTS_SHARE = 1 / 8


class UnexpectedProgram(RuntimeError):
    """XLA merged, dropped or added what a measurement is about."""


def chain(op: Callable, num_calls: int) -> Callable:
    """`op(changing[i], *fixed)` for each i, one call after the other.

    No kernel runs between the calls. Every call has parameters of its own in `changing`, so that none can be merged
    with another, and its result is a result of the program, so that none can be dropped. The barrier makes each
    call depend on the one before; XLA's GPU compiler removes it only once all is scheduled.
    """

    def program(changing, fixed):
        outs = []
        for i in range(num_calls):
            following = changing[i + 1 : i + 2]
            out, following, fixed = jax.lax.optimization_barrier((op(changing[i], *fixed), following, fixed))
            changing = (*changing[: i + 1], *following, *changing[i + 2 :])
            outs.append(out)
        return outs

    return program


def compile_chain(op: Callable, mesh: Mesh, changing, fixed, num_calls: int, compiler_options=None):
    """The compiled chain, to be called with `((changing,) * num_calls, fixed)`."""
    spec = PartitionSpec(AXIS)
    program = jax.jit(jax.shard_map(chain(op, num_calls), mesh=mesh, in_specs=spec, out_specs=spec))
    return program.lower((changing,) * num_calls, fixed).compile(compiler_options=compiler_options)


def count_calls(text: str, marker: str) -> int:
    return len(re.findall(marker, text))


def count_copies(text: str, min_bytes: int) -> int:
    """Copy instructions of at least `min_bytes` in a compiled program."""
    count = 0
    for dtype, dims in re.findall(r"= \(?([a-z]+\d+\w*)\[([\d,]*)\][^=\n]*? copy(?:-start)?\(", text):
        bits = int(re.findall(r"\d+", dtype)[0])
        count += math.prod(int(d) for d in dims.split(",") if d) * bits // 8 >= min_bytes
    return count


def check_chain(
    one: str, many: str, num_calls: int, marker: str | None, calls_each: int | None, min_bytes: int
) -> None:
    """Raises unless the compiled text `many` does `num_calls` times what `one` does."""
    if marker is not None:
        each = count_calls(one, marker)
        if calls_each is not None and each != calls_each:
            raise UnexpectedProgram(f"expected {calls_each} calls in the compiled program, got {each}")
        got = count_calls(many, marker)
        if got != num_calls * each:
            raise UnexpectedProgram(f"expected {num_calls} x {each} calls in the compiled program, got {got}")
    copies, allowed = count_copies(many, min_bytes), num_calls * count_copies(one, min_bytes)
    if copies > allowed:
        raise UnexpectedProgram(f"expected at most {allowed} copies of large operands, got {copies}")


def measure(
    op: Callable,
    mesh: Mesh,
    changing,
    fixed=(),
    *,
    marker: str | None = None,
    calls_each: int | None = None,
    compiler_options: dict | None = None,
    verify: Callable = lambda out: None,
) -> Times:
    """Times `op(changing, *fixed)`, mapped over the mesh's axis; all are arrays sharded along it. `verify` is given
    the result of one call, to raise what is wrong with it.

    Raises:
      UnexpectedProgram: the compiled program does not make as many calls as it should; those are counted by the regular
        expression `marker`, `calls_each` per op if given.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    compiled = one = compile_chain(op, mesh, changing, fixed, 1, compiler_options)
    per_call, result_bytes = _first_impression(one, changing, fixed, mesh, verify)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves((changing, fixed))) // mesh.size
    # The CPU compiler drops barriers and runs independent calls side by side: one call per program there.
    num_calls = 1 if on_cpu else _calls_per_program(per_call, result_bytes // mesh.size, mesh)
    if num_calls > 1:
        compiled = compile_chain(op, mesh, changing, fixed, num_calls, compiler_options)
    check_chain(one.as_text(), compiled.as_text(), num_calls, marker, calls_each, max(1, largest // 16))

    def run():
        return compiled((changing,) * num_calls, fixed)

    ahead = 0 if on_cpu else _AHEAD
    if num_calls > 1:  # what is loaded or recorded at first
        seconds(run, 3, ahead)
    (per_program,) = agreed_maximum([seconds(run, 2, ahead) / 2], mesh)
    num_programs = max(1, math.ceil(_SECONDS_PER_SAMPLE / per_program))
    samples = [_seconds_per_program(run, num_programs, ahead) / num_calls for _ in range(_REPEATS)]
    return Times(agreed_maximum(samples, mesh), num_calls)


def _seconds_per_program(run: Callable, num_programs: int, ahead: int) -> float:
    """In a steady state: with programs ahead, without what it takes to start the first and to hear of the last."""
    if ahead == 0:
        return seconds(run, num_programs) / num_programs
    few = ahead + 1
    return (seconds(run, few + num_programs, ahead) - seconds(run, few, ahead)) / num_programs


def seconds(run: Callable, num_programs: int = 1, ahead: int = 0) -> float:
    """How long it takes to run `run` that often. With `ahead`, a program is started while the one before still
    runs, so that the time to start it is hidden."""
    in_flight: collections.deque = collections.deque()
    start = time.perf_counter()
    for _ in range(num_programs):
        in_flight.append(run())
        if len(in_flight) > ahead:
            jax.block_until_ready(in_flight.popleft())
    jax.block_until_ready(list(in_flight))
    return time.perf_counter() - start


def agreed_maximum(values: list[float], mesh: Mesh) -> list[float]:
    """The largest of all processes' values: what is run next must follow from the same numbers everywhere."""
    if jax.process_count() == 1:
        return values
    mine, sharding = np.array([values], np.float32), NamedSharding(mesh, PartitionSpec(AXIS))
    everyones = jax.make_array_from_callback((mesh.size, len(values)), sharding, lambda index: mine)
    maximum = jax.jit(lambda a: jnp.max(a, 0), out_shardings=NamedSharding(mesh, PartitionSpec()))(everyones)
    return np.asarray(maximum.addressable_data(0)).astype(float).tolist()


def _first_impression(one, changing, fixed, mesh: Mesh, verify: Callable) -> tuple[float, int]:
    """Seconds per call, the same in all processes, and the bytes of its results on all devices."""
    (out,) = jax.block_until_ready(one((changing,), fixed))
    result_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(out))
    verify(out)
    del out
    (per_call,) = agreed_maximum([seconds(lambda: one((changing,), fixed))], mesh)
    return per_call, result_bytes


def _calls_per_program(per_call: float, result_bytes: int, mesh: Mesh) -> int:
    """As many as fill a program's time, within what their results may take; the same in all processes."""
    stats = mesh.local_devices[0].memory_stats() or {}
    room = stats.get("bytes_limit", 2**34) * _RESULTS_SHARE
    calls = int(min(_MAX_CALLS, _SECONDS_PER_PROGRAM / per_call, room / max(1, result_bytes)))
    return int(agreed_maximum([max(1, calls)], mesh)[0])
