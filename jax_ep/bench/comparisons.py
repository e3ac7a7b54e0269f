"""Programs side by side: ops beside compute, and around it, without command buffers, and with fewer blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from jax_ep._ffi import on_collective_stream
from jax_ep.bench.layer import Layer, Received
from jax_ep.bench.ops import Op, all_ops
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import Comparison, Row, Times, first_line
from jax_ep.bench.rows import measure_op
from jax_ep.bench.timing import OUR_CALLS, measure
from jax_ep.bench.verify import Expected, expect_equal

FEW_BLOCKS = 32
# Half a millisecond of an H200.
_PRODUCT_FLOPS = 3.5e11
_PRODUCT_GROUPS = 8
_ELEMENTWISE_STEPS = 12


def measure_all(problem: Problem, rows: list[Row]) -> Iterator[Comparison]:
    if problem.workload.low_latency:
        with Problem(problem.workload, problem.mesh, max_requests=1) as in_halves:
            yield from measure_halves(in_halves)
    else:
        yield from measure_few_blocks(problem, rows)
        with Problem(problem.workload, problem.mesh, num_sms=FEW_BLOCKS) as few:
            yield from measure_overlap(few)
        with Problem(problem.workload, problem.mesh, max_requests=1) as in_halves:
            yield from measure_halves(in_halves)
    yield from measure_command_buffers(problem)


def measure_overlap(problem: Problem) -> Iterator[Comparison]:
    """A dispatch and compute that does not depend on it in one program, against the longer of the two alone.

    Of few blocks: beside a dispatch on all SMs nothing else runs. Without command buffers, which XLA replays one
    kernel after the other.
    """
    layer, op = Layer(problem.comm), _op(problem, "dispatch, cached handle")
    a, b = _product_operands(problem)
    serial = _without_command_buffers(problem)

    def dispatch(weights, x, handle):
        return layer.cached(weights, x, handle)[0]

    def time(name: str, fn: Callable, changing, *fixed) -> Comparison:
        return _comparison(
            name, lambda: measure(fn, problem.mesh, changing, fixed, marker=OUR_CALLS, compiler_options=serial)
        )

    alone = time(f"dispatch, cached handle, {FEW_BLOCKS} blocks, alone", dispatch, op.changing, *op.fixed)
    yield alone
    for name, compute in (("matrix product", _product), ("elementwise", _elementwise)):

        def both(dispatch: Callable, compute=compute) -> Callable:
            return lambda changing, x, handle, b: (dispatch(changing[0], x, handle), compute(changing[1], b))

        yield (beside := time(f"{name} alone", compute, a, b))
        longer = _longer(alone, beside)
        for how, fn in (
            ("in one program", dispatch),
            ("dispatch on XLA's collective stream", on_collective_stream(dispatch)),
        ):
            together = time(f"dispatch and {name}, {how}", both(fn), (op.changing, a), *op.fixed, b)
            yield together.against("the longer alone", longer.times)


def measure_halves(problem: Problem) -> Iterator[Comparison]:
    """Compute between the halves of an op, against the same one after the other, and against the longer of the two
    alone. In the high-throughput mode without command buffers, which replay one kernel after the other."""
    layer, expected = Layer(problem.comm), Expected(problem)
    a = problem.random(problem.x.shape, seed=4)

    def time(name: str, fn: Callable, changing, *fixed, verify=lambda out: None, kept=None) -> Comparison:
        options = {} if problem.workload.low_latency else _without_command_buffers(problem)
        how = dict(marker=OUR_CALLS, compiler_options=options, verify=verify, kept=kept)
        return _comparison(name, lambda: measure(fn, problem.mesh, changing, fixed, **how))

    yield (compute := time("elementwise alone", lambda a: _elementwise(a, None), a))
    for name, start, finish in (
        ("dispatch, fresh routing", layer.start_fresh, lambda request: Received.of(*request.wait())),
        ("combine, weighted", layer.start_combine, lambda request: request.wait()),
    ):
        op = _op(problem, name)

        def whole(changing, *fixed, op=op):
            out, a = lax.optimization_barrier((op.fn(changing[0], *fixed), changing[1]))
            return out, _elementwise(a, None)

        def halves(changing, *fixed, start=start, finish=finish):
            request, computed = lax.optimization_barrier((start(changing[0], *fixed), _elementwise(changing[1], None)))
            return finish(request), computed

        both = dict(
            verify=lambda out, op=op: op.verify(expected, out[0]),
            kept=op.kept and (lambda out, op=op: (op.kept(out[0]), out[1])),
        )
        yield (alone := time(f"{name}, alone", op.fn, op.changing, *op.fixed, kept=op.kept))
        yield (one_by_one := time(f"{name}, then elementwise", whole, (op.changing, a), *op.fixed, **both))
        between = time(f"{name}, elementwise between its halves", halves, (op.changing, a), *op.fixed, **both)
        yield between.against("one after the other", one_by_one.times)
        yield between.against("the longer alone", _longer(alone, compute).times)


def measure_command_buffers(problem: Problem) -> Iterator[Comparison]:
    """All of a layer's calls with XLA's command buffers and without: the same results, and both times."""
    op = _op(problem, "forward" if problem.workload.low_latency else "forward + backward")
    results: list[list] = []  # of each program that is timed: of one call, and of many

    def same_as_before(out) -> None:
        results[-1].append(out)
        before = results[0][len(results[-1]) - 1 :]
        if before:
            expect_equal("with command buffers and without", out, before[0])

    def time(name: str, options: dict, num_calls: int | None = None) -> Comparison:
        results.append([])
        return _comparison(
            name,
            lambda: op.measure(problem.mesh, compiler_options=options, verify=same_as_before, num_calls=num_calls),
        )

    without = time(f"{op.name}, no command buffers", {"xla_gpu_enable_command_buffer": ""})
    yield without
    # What a call returns may depend on how many came before it.
    num_calls = without.times.num_calls if without.times else None
    yield time(f"{op.name}, command buffers as by default", {}, num_calls).against("without", without.times)


def measure_few_blocks(problem: Problem, rows: list[Row]) -> Iterator[Comparison]:
    """Ops with `FEW_BLOCKS` blocks, against the same with as many as they choose."""
    best = {row.name: row.times for row in rows}
    with Problem(problem.workload, problem.mesh, num_sms=FEW_BLOCKS) as few:
        for op in all_ops(few):
            if op.name in ("dispatch, cached handle", "combine, weighted"):
                row = measure_op(few, op)
                name = f"{op.name}, {FEW_BLOCKS} blocks"
                yield Comparison(name, row.times, row.error).against("all blocks", best.get(op.name))


def _op(problem: Problem, name: str) -> Op:
    return next(op for op in all_ops(problem) if op.name == name)


def _comparison(name: str, time: Callable[[], Times]) -> Comparison:
    try:
        return Comparison(name, time(), None)
    except Exception as error:  # the others are worth having
        return Comparison(name, None, first_line(error))


def _longer(one: Comparison, other: Comparison) -> Comparison:
    return max(one, other, key=lambda comparison: comparison.times.median if comparison.times else 0.0)


def _without_command_buffers(problem: Problem) -> dict[str, str]:
    return {"xla_gpu_enable_command_buffer": ""} if problem.mesh.devices.flat[0].platform == "gpu" else {}


def _product(a, b):
    return jnp.einsum("gmh,ghf->gmf", a, b)


def _elementwise(a, _):
    """As bound by arithmetic as a product, in one kernel of many small blocks."""
    for _ in range(_ELEMENTWISE_STEPS):
        a = jnp.sin(a) * a
    return a


def _product_operands(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """[G, M, H] and [G, H, F] per rank; F as large as takes the time on a GPU."""
    hidden, on_cpu = problem.workload.hidden_size, problem.mesh.devices.flat[0].platform == "cpu"
    rows = problem.workload.num_tokens if on_cpu else max(4096, problem.workload.num_tokens)
    rows = rows // _PRODUCT_GROUPS * _PRODUCT_GROUPS
    features = 128 if on_cpu else max(128, int(_PRODUCT_FLOPS / (2 * rows * hidden)) // 128 * 128)
    groups = problem.num_ranks * _PRODUCT_GROUPS
    a = problem.random((groups, rows // _PRODUCT_GROUPS, hidden), seed=4)
    return a, problem.random((groups, hidden, features), seed=5)
