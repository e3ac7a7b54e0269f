"""Times the ops."""

from __future__ import annotations

from collections.abc import Iterator

from jax_ep.bench.ops import Op, all_ops
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import Row, first_line
from jax_ep.bench.timing import OUR_CALLS, measure

NUM_OPS = 7


def measure_op(problem: Problem, op: Op) -> Row:
    row_bytes = problem.row_bytes
    link_bytes = op.link_passes * problem.traffic.rows_over_link * row_bytes
    times, error = None, None
    try:
        times = measure(op.fn, problem.mesh, op.changing, op.fixed, marker=OUR_CALLS, calls_each=op.num_calls)
        problem.comm.check()
    except Exception as failure:  # the other rows are worth having
        times, error = None, first_line(failure)
    return Row(op.name, times, error, link_bytes, op.local_rows * row_bytes)


def measure_rows(problem: Problem, only: str | None = None) -> Iterator[Row]:
    for op in all_ops(problem):
        if only is None or only in op.name:
            yield measure_op(problem, op)
