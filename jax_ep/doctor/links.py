"""Bandwidth and latency between every two devices of this process."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_ep import _ffi
from jax_ep.bench import ceilings
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import first_line
from jax_ep.bench.timing import AXIS
from jax_ep.bench.workloads import Workload
from jax_ep.doctor.findings import Links

_MOST_DEVICES = 16
_TIMEOUT_S = 10.0
_COPY_BYTES = {"gpu": 256 << 20}
_CPU_COPY_BYTES = 8 << 20
_REPEATS = 5
_SMALL_REPEATS = 30
# Copies in flight, so that the time to start one is hidden.
_AHEAD = 4
# Rows enough for a store rate, and little memory.
_STORES = Workload("stores", num_tokens=1024, hidden_size=4096, num_experts=2, topk=1)

_BY_COPIES = (
    "jax.device_put of {size} MiB, best of {repeats}, one direction at a time. It includes the allocation of the "
    "result and what the runtime does for a copy{cpu}; the kernels of jax_ep do not copy this way"
)
_ON_CPU = ", on virtual devices that share one memory"
_BY_STORES = "plain stores of a kernel to the other GPU's memory, both directions at once: what jax_ep's kernels do"
_SMALL_COPY = "a jax.device_put of 4 bytes, median: mostly the host's time to start it and to hear of its end"
_ONE_FLAG = "half of a flag's round trip between two kernels"


def measure_links(devices: list[jax.Device]) -> Links | None:
    """What is between every two of them; None for fewer than 2. By kernels where jax_ep has them, else by copies."""
    if len(devices) < 2:
        return None
    measured = devices[:_MOST_DEVICES]
    left_out = len(devices) - len(measured)
    if measured[0].platform == "gpu" and _has_kernels():
        links = by_stores(measured, left_out)
        if any(value is not None for row in links.bytes_per_s for value in row):
            return links
        return dataclasses.replace(by_copies(measured, left_out), errors=links.errors)
    return by_copies(measured, left_out)


def _has_kernels() -> bool:
    try:
        _ffi.extension("cuda")
    except Exception:  # told elsewhere
        return False
    return True


def by_copies(devices: list[jax.Device], left_out: int = 0) -> Links:
    """Times `jax.device_put`."""
    on_cpu = devices[0].platform == "cpu"
    num_bytes = _COPY_BYTES.get(devices[0].platform, _CPU_COPY_BYTES)
    large = [jax.device_put(np.zeros(num_bytes // 4, np.float32), device) for device in devices]
    small = [jax.device_put(np.zeros(1, np.float32), device) for device in devices]

    def measure(i: int, j: int) -> tuple[float, float]:
        copy_s = min(_seconds(large[i], devices[j], _AHEAD) for _ in range(_REPEATS))
        latency_s = statistics.median(_seconds(small[i], devices[j], 1) for _ in range(_SMALL_REPEATS))
        return num_bytes / copy_s, latency_s

    method = _BY_COPIES.format(size=num_bytes >> 20, repeats=_REPEATS, cpu=_ON_CPU if on_cpu else "")
    transport = "one process's memory" if on_cpu else "copies of the runtime between devices"
    return _every_two(devices, measure, transport, method, _SMALL_COPY, itertools.permutations, left_out)


def _seconds(source: jax.Array, device: jax.Device, num_copies: int) -> float:
    """Per copy. The results are freed when all have come."""
    start = time.perf_counter()
    jax.block_until_ready([jax.device_put(source, device, may_alias=False) for _ in range(num_copies)])
    return (time.perf_counter() - start) / num_copies


def by_stores(devices: list[jax.Device], left_out: int = 0) -> Links:
    """Measures by the ceilings of the benchmark, on two ranks at a time."""

    def measure(i: int, j: int) -> tuple[float | None, float | None]:
        mesh = Mesh(np.array([devices[i], devices[j]]), (AXIS,), axis_types=(AxisType.Auto,))
        with Problem(_STORES, mesh, timeout_s=_TIMEOUT_S) as problem:
            round_trip_s = ceilings._flag_round_trip(problem)
            return ceilings._store_rate(problem), round_trip_s and round_trip_s / 2

    transport = "GPU peer access (NVLink, or PCIe where there is none)"
    return _every_two(devices, measure, transport, _BY_STORES, _ONE_FLAG, itertools.combinations, left_out)


def _every_two(
    devices: list[jax.Device],
    measure: Callable,
    transport: str,
    method: str,
    latency_is: str,
    pairs: Callable,
    left_out,
) -> Links:
    """One measurement per pair, of which unordered ones count for both directions."""
    bandwidth: list[list[float | None]] = [[None] * len(devices) for _ in devices]
    latency: list[list[float | None]] = [[None] * len(devices) for _ in devices]
    errors = {}
    for i, j in pairs(range(len(devices)), 2):
        try:
            measured = measure(i, j)
        except Exception as error:  # two devices that nothing connects are a finding
            errors[f"{devices[i].id} and {devices[j].id}"] = first_line(error)
            continue
        for a, b in ((i, j), (j, i)) if pairs is itertools.combinations else ((i, j),):
            bandwidth[a][b], latency[a][b] = measured
    ids = [device.id for device in devices]
    return Links(transport, method, ids, bandwidth, latency, latency_is, errors, left_out)
