"""The ops that are measured: what each calls, on what, how it is checked, and the bytes that it cannot avoid moving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jax_ep.bench.layer import Layer, Received, quantized_row_bytes
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import Times
from jax_ep.bench.timing import OUR_CALLS, measure
from jax_ep.bench.verify import Expected
from jax_ep.bench.workloads import Workload

# Per rank, of decoding with few sequences; beside the workload's own number.
_FEW_TOKENS = (8, 1)


@dataclasses.dataclass(frozen=True)
class Op:
    """`fn(changing, *fixed)`, see `timing.measure`."""

    name: str
    fn: Callable
    changing: Any
    fixed: tuple
    num_calls: int  # custom calls that it makes
    link_bytes: int  # through the busier direction of the most loaded rank's link
    local_bytes: int  # that a rank reads and writes at least
    flag_round_trips: int = 0  # that the link's floor has besides
    verify: Callable[[Expected, Any], None] = lambda expected, out: None
    kept: Callable | None = None
    feeds_back: bool = False

    def measure(self, mesh: Mesh, **how) -> Times:
        """As `timing.measure`; `verify` there takes a result alone."""
        return measure(
            self.fn,
            mesh,
            self.changing,
            self.fixed,
            marker=OUR_CALLS,
            calls_each=self.num_calls,
            feeds_back=self.feeds_back,
            **how,
        )


def all_ops(problem: Problem) -> list[Op]:
    """Every op on the problem's arrays. What changes from call to call is small: it exists once per call."""
    return _low_latency_ops(problem) if problem.workload.low_latency else _high_throughput_ops(problem)


def num_ops(workload: Workload) -> int:
    return 4 + len(_fewer_tokens(workload)) if workload.low_latency else 8


def _fewer_tokens(workload: Workload) -> list[int]:
    return [count for count in _FEW_TOKENS if count < workload.num_tokens]


def _high_throughput_ops(problem: Problem) -> list[Op]:
    layer, x = Layer(problem.comm), problem.x
    ids_and_weights = (problem.topk_ids, problem.weights)
    handle = problem.handle()
    y, row_weights = problem.map(layer.cached, problem.weights, x, handle)
    # T tokens, N rows that hold one, and C rows in all: those without a token have to be zeroed.
    row, quantized_row = problem.row_bytes, quantized_row_bytes(problem.workload.hidden_size)
    t, n, c = problem.workload.num_tokens * row, problem.traffic.rows_received * row, problem.capacity * row
    once = problem.traffic.rows_over_link * row
    backward_operands = (y, x, problem.weights, handle)
    dispatched, combined = t + c, n + t
    # The gradient of a weighted combine is a dispatch that also reads what was combined.
    combine_gradient = t + n + c
    return [
        Op(
            "dispatch, fresh routing",
            layer.fresh,
            ids_and_weights,
            (x,),
            1,
            once,
            dispatched,
            verify=Expected.check_received,
        ),
        Op(
            "dispatch, quantised to fp8",
            layer.quantized,
            ids_and_weights,
            (x,),
            1,
            problem.traffic.rows_over_link * quantized_row,
            t + problem.capacity * quantized_row,
            verify=Expected.check_quantized,
        ),
        Op(
            "dispatch, cached handle",
            layer.cached,
            problem.weights,
            (x, handle),
            1,
            once,
            dispatched,
            verify=Expected.check_rows,
        ),
        Op(
            "combine, weighted",
            layer.combine,
            row_weights,
            (y, handle),
            1,
            once,
            combined,
            verify=Expected.check_sums,
        ),
        Op("dispatch backward", layer.dispatch_backward, row_weights, backward_operands, 1, once, combined),
        Op("combine backward", layer.combine_backward, row_weights, (x, y, handle), 1, once, combine_gradient),
        Op(
            "forward",
            layer.forward,
            ids_and_weights,
            (x,),
            2,
            2 * once,
            dispatched + combined,
            verify=Expected.check_sums,
        ),
        Op(
            "forward + backward",
            layer.forward_and_backward,
            ids_and_weights,
            (x, x),
            4,
            4 * once,
            dispatched + combined + combine_gradient + combined,
            verify=lambda expected, out: expected.check_sums(out[0]),
        ),
    ]


def _low_latency_ops(problem: Problem) -> list[Op]:
    """Forward only. Of a dispatch's result just the counts outlive the call: it has slots for the worst case, of which
    hardly any hold a token, and a program that keeps those of all its calls finds no room."""
    layer, inputs = Layer(problem.comm), problem.inputs
    ids_and_weights = (inputs.topk_ids, inputs.weights)
    handle = problem.handle()
    received = problem.map(layer.fresh, ids_and_weights, inputs.x)
    # Nothing is zeroed.
    row, quantized_row = problem.row_bytes, quantized_row_bytes(problem.workload.hidden_size)
    t, n, crossing = problem.workload.num_tokens, inputs.traffic.rows_received, inputs.traffic.rows_over_link
    ops = [
        Op(
            "dispatch, fresh routing",
            layer.fresh,
            ids_and_weights,
            (inputs.x,),
            1,
            crossing * row,
            (t + n) * row,
            verify=Expected.check_received,
            kept=Received.counts,
        ),
        Op(
            "dispatch, quantised to fp8",
            layer.quantized,
            ids_and_weights,
            (inputs.x,),
            1,
            crossing * quantized_row,
            t * row + n * quantized_row,
            verify=Expected.check_quantized,
            kept=Received.counts,
        ),
        Op(
            "combine, weighted",
            layer.combine,
            received.row_weights,
            (received.tokens, handle),
            1,
            crossing * row,
            (n + t) * row,
            verify=Expected.check_sums,
        ),
        _low_latency_forward(problem, "forward", problem.workload.num_tokens),
        *(
            _low_latency_forward(problem, f"forward, {count} token{'s' * (count > 1)} per rank", count)
            for count in _fewer_tokens(problem.workload)
        ),
    ]
    return [dataclasses.replace(op, flag_round_trips=1) for op in ops]


def _low_latency_forward(problem: Problem, name: str, num_tokens: int) -> Op:
    """Dispatch and combine, one layer after the other: what a call returns is what the next one sends."""
    inputs, row = problem.first(num_tokens), problem.row_bytes
    return Op(
        name,
        Layer(problem.comm).forward_of,
        inputs.x,
        (inputs.topk_ids, inputs.weights),
        2,
        2 * inputs.traffic.rows_over_link * row,
        2 * (num_tokens + inputs.traffic.rows_received) * row,
        verify=Expected.check_sums,
        feeds_back=True,
    )
