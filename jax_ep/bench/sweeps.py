"""What the plot shows: dispatch and combine over block counts, and over tokens per rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jax.sharding import Mesh

from jax_ep.bench.ops import all_ops
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import Point
from jax_ep.bench.rows import measure_op
from jax_ep.bench.workloads import Workload

_SWEPT = ("dispatch, cached handle", "combine, weighted")
_SWEPT_LOW_LATENCY = ("dispatch, fresh routing", "combine, weighted")
_BLOCKS = (8, 16, 24, 32, 48, 64, 96, 132)
_FEWEST_TOKENS = 256


def measure_sweeps(workload: Workload, mesh: Mesh) -> Iterator[Point]:
    device = mesh.devices.flat[0]
    num_sms = getattr(device, "core_count", None) or _BLOCKS[-1]
    for blocks in _BLOCKS:
        # The CPU has no blocks to choose.
        if device.platform != "cpu" and blocks <= num_sms:
            yield from _points("blocks", blocks, workload, mesh, num_sms=blocks)
    for tokens in _token_counts(workload.num_tokens):
        yield from _points("tokens", tokens, dataclasses.replace(workload, num_tokens=tokens), mesh)


def _token_counts(most: int) -> list[int]:
    counts = [most]
    while counts[-1] // 2 >= min(_FEWEST_TOKENS, most // 4):
        counts.append(counts[-1] // 2)
    return counts[::-1]


def _points(axis: str, value: int, workload: Workload, mesh: Mesh, **arguments) -> Iterator[Point]:
    with Problem(workload, mesh, **arguments) as problem:
        for op in all_ops(problem):
            if op.name in (_SWEPT_LOW_LATENCY if workload.low_latency else _SWEPT):
                yield Point(axis, value, measure_op(problem, op))
