"""Times the ops."""

from __future__ import annotations

from collections.abc import Iterator

from jax_ep.bench.ops import Op, all_ops
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import Row, first_line
from jax_ep.bench.verify import Expected


def measure_op(problem: Problem, op: Op, expected: Expected | None = None) -> Row:
    """With `expected`, a wrong result fails."""
    times, error = None, None

    def verify(out) -> None:
        if expected is not None:
            op.verify(expected, out)

    try:
        times = op.measure(problem.mesh, verify=verify, kept=op.kept)
        problem.comm.check()
    except Exception as failure:  # the other rows are worth having
        times, error = None, first_line(failure)
    return Row(op.name, times, error, op.link_bytes, op.local_bytes, op.flag_round_trips)


def measure_rows(problem: Problem, only: str | None = None) -> Iterator[Row]:
    expected = Expected(problem)
    for op in all_ops(problem):
        if only is None or only in op.name:
            yield measure_op(problem, op, expected)
