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
# Calls in a program: as many as fill a time, but not so many that compiling takes long; more of them where they are so
# short that the host could not start such programs as fast as they run.
_MAX_CALLS = 16
_MAX_SHORT_CALLS = 512
_SECONDS_PER_PROGRAM = 0.05
_SHORTEST_PROGRAM_S = 0.005
_SECONDS_PER_SAMPLE = 0.05
# Programs in flight on GPUs, so that the time to start one is hidden.
_AHEAD = 2
# Of a device's memory, for the results of the calls of one program.
_RESULTS_SHARE = 1 / 8


class UnexpectedProgram(RuntimeError):
    """XLA merged, dropped or added what a measurement is about."""


def chain(op: Callable, num_calls: int, kept: Callable | None = None) -> Callable:
    """`op(changing[i], *fixed)` for each i, one call after the other.

    No kernel runs between the calls. Every call has parameters of its own in `changing`, so that none can be merged
    with another, and its result is a result of the program, so that none can be dropped. The barrier makes each
    call depend on the one before; XLA's GPU compiler removes it only once all is scheduled.

    With `kept`, only that part of a call's result is the program's. A custom call writes all of its results if any is
    used, and the others' memory is free again for the next call.
    """

    def program(changing, fixed):
        outs = []
        for i in range(num_calls):
            following = changing[i + 1 : i + 2]
            out = op(changing[i], *fixed)
            out = out if kept is None else kept(out)
            out, following, fixed = jax.lax.optimization_barrier((out, following, fixed))
            changing = (*changing[: i + 1], *following, *changing[i + 2 :])
            outs.append(out)
        return outs

    return program


def chain_that_feeds_back(op: Callable, num_calls: int) -> Callable:
    """`op(carried, *fixed)`, where each call takes the result of the one before: none can be merged or dropped."""

    def program(changing, fixed):
        (carried,) = changing
        for _ in range(num_calls):
            carried = op(carried, *fixed)
        return [carried]

    return program


def compile_chain(
    op: Callable,
    mesh: Mesh,
    changing,
    fixed,
    num_calls: int,
    compiler_options=None,
    *,
    kept: Callable | None = None,
    feeds_back: bool = False,
):
    """The compiled chain, to be called with `((changing,) * num_calls, fixed)`; one that feeds back, with
    `((changing,), fixed)`."""
    spec = PartitionSpec(AXIS)
    body = chain_that_feeds_back(op, num_calls) if feeds_back else chain(op, num_calls, kept)
    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    changing = (changing,) * (1 if feeds_back else num_calls)
    return program.lower(changing, fixed).compile(compiler_options=compiler_options)


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
    kept: Callable | None = None,
    feeds_back: bool = False,
    num_calls: int | None = None,
) -> Times:
    """Times `op(changing, *fixed)`, mapped over the mesh's axis; all are arrays sharded along it.

    `verify` is given the result of a program of one call, and that of the last of many unless only a part of it is
    `kept`, to raise what is wrong with it. An op that `feeds_back` takes for `changing` what it returned before.

    Raises:
      UnexpectedProgram: the compiled program does not make as many calls as it should; those are counted by the regular
        expression `marker`, `calls_each` per op if given.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    ahead = 0 if on_cpu else _AHEAD
    one = compile_chain(op, mesh, changing, fixed, 1, compiler_options)
    per_call, most = _first_impression(one, changing, fixed, mesh, verify, kept)
    few = max(1, min(_MAX_CALLS, most, int(_SECONDS_PER_PROGRAM / per_call)))
    if on_cpu:  # whose compiler drops barriers and runs independent calls side by side
        few = most = 1
    if num_calls:
        few = most = num_calls
    largest = max(leaf.nbytes for leaf in jax.tree.leaves((changing, fixed))) // mesh.size

    def program_of(calls: int) -> Callable:
        compiled = one
        if calls > 1 or kept is not None:
            compiled = compile_chain(
                op, mesh, changing, fixed, calls, compiler_options, kept=kept, feeds_back=feeds_back
            )
        check_chain(one.as_text(), compiled.as_text(), calls, marker, calls_each, max(1, largest // 16))
        operands = (changing,) * (1 if feeds_back else calls), fixed
        return lambda: compiled(*operands)

    run, calls, per_program = _long_enough(program_of, few, most, ahead, mesh)
    if kept is None and calls > 1:
        verify(run()[-1])
    num_programs = max(1, math.ceil(_SECONDS_PER_SAMPLE / per_program))
    samples = [_seconds_per_program(run, num_programs, ahead) / calls for _ in range(_REPEATS)]
    return Times(agreed_maximum(samples, mesh), calls)


def _long_enough(program_of: Callable, few: int, most: int, ahead: int, mesh: Mesh) -> tuple[Callable, int, float]:
    """A program of `few` calls, or of up to `most` so that it is not too short; its calls, and the seconds it takes."""
    calls = few
    while True:
        run = program_of(calls)
        if ahead:
            seconds(run, 3, ahead)  # what is loaded or recorded at first
        (per_program,) = agreed_maximum([seconds(run, 2, ahead) / 2], mesh)
        if per_program >= _SHORTEST_PROGRAM_S or calls >= most:
            return run, calls, per_program
        calls = min(most, calls * math.ceil(_SHORTEST_PROGRAM_S / per_program))


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


def _first_impression(one, changing, fixed, mesh: Mesh, verify: Callable, kept: Callable | None) -> tuple[float, int]:
    """Seconds per call, and the most calls whose results have room; the same in all processes."""
    (out,) = jax.block_until_ready(one((changing,), fixed))
    verify(out)
    result_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(out if kept is None else kept(out)))
    del out
    (per_call,) = agreed_maximum([seconds(lambda: one((changing,), fixed))], mesh)
    stats = mesh.local_devices[0].memory_stats() or {}
    room = stats.get("bytes_limit", 2**34) * _RESULTS_SHARE
    calls = min(_MAX_SHORT_CALLS, room * mesh.size / max(1, result_bytes))
    return per_call, int(agreed_maximum([max(1, int(calls))], mesh)[0])
