"""Stock JAX at its best: every pipeline with every set of XLA flags that may help it, checked and timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jax_ep.bench.problem import Problem
from jax_ep.bench.results import STOCK_OPS, Baseline, first_line
from jax_ep.bench.stock import Pipeline
from jax_ep.bench.timing import AXIS, COLLECTIVES, measure
from jax_ep.bench.verify import Expected, expect_close, expect_equal
from jax_ep.bench.workloads import Traffic, Workload

# A pipeline that is this much slower than the fastest is not measured further.
_HOPELESS = 1.5

_EVERYWHERE: dict[str, dict[str, Any]] = {"default": {}}
_ON_GPUS: dict[str, dict[str, Any]] = {
    "latency hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "no command buffers": {"xla_gpu_enable_command_buffer": ""},
    "NCCL user buffers": {"xla_gpu_enable_nccl_user_buffers": True},
    "NCCL symmetric buffers": {"xla_gpu_experimental_enable_nccl_symmetric_buffers": True},
}
_DENSE: dict[str, dict[str, Any]] = {"local p2p by memcpy": {"xla_gpu_use_memcpy_local_p2p": True}}
_NOT_ONE_SHOT: dict[str, Any] = {"xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel": False}
_RAGGED: dict[str, dict[str, Any]] = {
    "decomposed": _NOT_ONE_SHOT | {"xla_gpu_unsupported_enable_ragged_all_to_all_decomposer": True},
    "no one-shot kernel": _NOT_ONE_SHOT,
    "NCCL send and recv": _NOT_ONE_SHOT | {"xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback": True},
    "barrier": {"xla_gpu_experimental_ragged_all_to_all_use_barrier": True},
    "no NCCL barrier": {"xla_gpu_experimental_ragged_all_to_all_use_barrier_with_nccl": False},
    "zero copy": {"xla_gpu_experimental_ragged_all_to_all_zero_copy": True},
    "device kernel": _NOT_ONE_SHOT
    | {
        "xla_gpu_experimental_ragged_all_to_all_use_device_kernel": True,
        "xla_enable_nccl_symmetric_buffers_for_collectives": "raggedalltoall",
    },
    "symmetric memory": {"xla_gpu_ragged_all_to_all_mode": "COLLECTIVES_SYMMETRIC_MEMORY"},
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One thing to time. Its key names it across processes."""

    pipeline: Pipeline
    op: str
    flags_name: str
    flags: dict[str, Any] = dataclasses.field(hash=False)

    @property
    def key(self) -> str:
        return f"{self.op}: {self.pipeline.name}, {self.flags_name}"

    def failed(self, reason: str) -> Baseline:
        return Baseline(self.op, self.pipeline.name, self.flags, None, reason)


Measured = tuple[Configuration, Baseline]


def pipelines(workload: Workload, traffic: Traffic, capacity: int, num_ranks: int) -> list[Pipeline]:
    """All four, sized for the routing; a pair of ranks gets the workload's share above what is balanced."""
    result = []
    for ragged in (False, True):
        for per_rank in (True, False):
            # Slots that a token needs: on average for one rank, at most for one rank, and at most for all.
            hit = 1 - (1 - 1 / num_ranks) ** workload.topk
            balanced = hit if per_rank else workload.topk / num_ranks
            to_one_rank = 1 if per_rank else workload.topk
            per_token = min(num_ranks, workload.topk) if per_rank else workload.topk
            needed = traffic.tokens_per_pair if per_rank else traffic.rows_per_pair
            granted = workload.num_tokens * min(to_one_rank, balanced * workload.capacity_factor)
            per_pair = max(needed, int(granted))
            received = traffic.tokens_received if per_rank else traffic.rows_received
            result.append(
                Pipeline(
                    axis_name=AXIS,
                    num_ranks=num_ranks,
                    num_local_experts=workload.num_experts // num_ranks,
                    capacity=capacity,
                    ragged=ragged,
                    per_rank=per_rank,
                    slots_sent=workload.num_tokens * per_token if ragged else num_ranks * per_pair,
                    slots_received=received if ragged else num_ranks * per_pair,
                )
            )
    return result


def flag_sets(ragged: bool, on_cpu: bool, sweep: bool) -> dict[str, dict[str, Any]]:
    if on_cpu or not sweep:
        return _EVERYWHERE
    return _EVERYWHERE | (_RAGGED if ragged else _DENSE) | _ON_GPUS


def num_at_most(workload: Workload, on_cpu: bool, sweep: bool, only: str | None) -> int:
    forward = sum(len(flag_sets(ragged, on_cpu, sweep)) + 2 for ragged in (False, True))
    return forward + 4 * len(_other_ops(workload, only))


def _other_ops(workload: Workload, only: str | None) -> list[str]:
    """Those that do the same as a row that is asked for."""
    ops = [op for row, op in STOCK_OPS.items() if op != "forward" and (only is None or only in row)]
    return [op for op in ops if not (workload.low_latency and "backward" in op)]


def measure_baselines(
    problem: Problem, *, sweep: bool, only: str | None, begin: Callable[[Configuration], Baseline | None]
) -> Iterator[tuple[str, Baseline]]:
    """Times the whole forward pass with every set of flags, then each op with its pipeline's best; yields keys too.

    Asks `begin` before each: it answers with the result if that is known already.
    """
    on_cpu = problem.mesh.devices.flat[0].platform == "cpu"
    expected = Expected(problem)
    forward: list[Measured] = []

    def run(configuration: Configuration) -> Baseline:
        return begin(configuration) or _measure(problem, expected, configuration)

    for first, *others in _by_collective(problem):
        swept: list[Measured] = []
        for name, flags in flag_sets(first.ragged, on_cpu, sweep).items():
            configuration = Configuration(first, "forward", name, flags)
            swept.append((configuration, run(configuration)))
            yield configuration.key, swept[-1][1]
        forward += swept
        # What helps one pipeline helps the other with the same collective: not all sets again.
        for pipeline in others:
            for configuration in dict.fromkeys((swept[0][0], _fastest_configuration(swept))):
                configuration = dataclasses.replace(configuration, pipeline=pipeline)
                forward.append((configuration, run(configuration)))
                yield configuration.key, forward[-1][1]
    for configuration in _worth_more(forward):
        for op in _other_ops(problem.workload, only):
            other = dataclasses.replace(configuration, op=op)
            yield other.key, run(other)


def _by_collective(problem: Problem) -> tuple[list[Pipeline], list[Pipeline]]:
    every = pipelines(problem.workload, problem.traffic, problem.capacity, problem.num_ranks)
    return [p for p in every if not p.ragged], [p for p in every if p.ragged]


def _seconds(measured: Measured) -> float:
    times = measured[1].times
    return times.median if times else math.inf


def _fastest_configuration(measured: list[Measured]) -> Configuration:
    return min(measured, key=_seconds)[0]


def _worth_more(forward: list[Measured]) -> list[Configuration]:
    """Each pipeline's fastest configuration, if it is not hopeless."""
    limit = _HOPELESS * min(map(_seconds, forward))
    chosen = []
    for pipeline in dict.fromkeys(configuration.pipeline for configuration, _ in forward):
        fastest = min((m for m in forward if m[0].pipeline == pipeline), key=_seconds)
        if fastest[1].times and _seconds(fastest) <= limit:
            chosen.append(fastest[0])
    return chosen


def _measure(problem: Problem, expected: Expected, configuration: Configuration) -> Baseline:
    if configuration.pipeline.ragged and problem.mesh.devices.flat[0].platform == "cpu":
        return configuration.failed("not available on cpu")
    try:
        fn, changing, fixed, verify = _op(problem, expected, configuration)
        times = measure(
            fn,
            problem.mesh,
            changing,
            fixed,
            marker=COLLECTIVES,
            compiler_options=configuration.flags,
            verify=verify,
        )
    except Exception as error:  # whatever a flag or an XLA version brings: the next one may work
        if "No such compile option" in str(error):
            return configuration.failed("unknown flag")
        return configuration.failed(first_line(error))
    return Baseline(configuration.op, configuration.pipeline.name, configuration.flags, times)


def _op(problem: Problem, expected: Expected, configuration: Configuration):
    """The op to time, what changes from call to call, what does not, and the check of its result."""
    pipeline, x = configuration.pipeline, problem.x
    ids_and_weights = (problem.topk_ids, problem.weights)

    def dispatch(changing, x):
        return pipeline.dispatch(x, *changing)

    def combine(weights, y, plan):
        return pipeline.combine(y, plan, weights)

    def forward(changing, x):
        return pipeline.combine(*pipeline.dispatch(x, *changing))

    def forward_and_backward(changing, x, gradients):
        topk_ids, weights = changing
        out, pull = jax.vjp(lambda x, w: forward((topk_ids, w), x), x, weights)
        return out, pull(gradients)

    match configuration.op:
        case "dispatch":
            check = lambda got: expect_equal("dispatch", got[0], expected.received.tokens)  # noqa: E731
            return dispatch, ids_and_weights, (x,), check
        case "combine":
            y, plan, weights = problem.map(dispatch, ids_and_weights, x)
            return combine, weights, (y, plan), expected.check_sums
        case "forward":
            return forward, ids_and_weights, (x,), expected.check_sums
        case _:
            want = expected.sums, expected.gradients
            check = lambda got: expect_close("forward + backward", got, want)  # noqa: E731
            return forward_and_backward, ids_and_weights, (x, x), check
