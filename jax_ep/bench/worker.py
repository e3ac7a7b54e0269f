"""One process of a stage: `python -m jax_ep.bench.worker STAGE`, started by `stages`."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import jax_ep
from jax_ep import MoEMode
from jax_ep.bench import baselines, ceilings, comparisons, experts, ops, rows, stress, sweeps, transfer
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import Baseline, restored
from jax_ep.bench.stages import Stage
from jax_ep.bench.timing import AXIS
from jax_ep.bench.workloads import WORKLOADS, Workload

_PR_SET_PDEATHSIG = 1
_CPU_DEVICES = 8
_GPU_DRIVER = pathlib.Path("/sys/module/nvidia/version")


class Reporter:
    """Tells the parent; in all processes but the first, nobody."""

    def __init__(self, descriptor: int | None):
        self._pipe = None if descriptor is None else os.fdopen(descriptor, "w", buffering=1)

    def __call__(self, kind: str, content) -> None:
        if self._pipe is not None:
            self._pipe.write(json.dumps([kind, content], default=dataclasses.asdict) + "\n")


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        sys.exit(1)


def _connect(stage: Stage) -> Mesh:
    """Virtual CPU devices where there is no GPU, and one process per GPU where several were asked for."""
    flags = os.environ.get("XLA_FLAGS", "")
    if stage.devices or "host_platform_device_count" not in flags:
        count = max(1, (stage.devices or _CPU_DEVICES) // stage.num_processes)
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    if stage.num_processes > 1:
        jax.distributed.initialize(
            f"localhost:{stage.port}", stage.num_processes, stage.process, local_device_ids=[stage.process]
        )
    devices = np.array(jax.devices()[: stage.devices])
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


def _workload(stage: Stage, on_cpu: bool) -> Workload:
    return WORKLOADS[stage.workload or ("cpu-2k" if on_cpu else "train-4k")]


def _environment(mesh: Mesh) -> dict[str, str]:
    device = mesh.devices.flat[0]
    driver = {"driver": _GPU_DRIVER.read_text().strip()} if _GPU_DRIVER.exists() else {}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "devices": f"{mesh.size}x {device.device_kind}",
        "processes": str(jax.process_count()),
        "platform": " ".join(getattr(device.client, "platform_version", device.platform).split()),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "jax_ep": jax_ep.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **driver,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _ours(stage: Stage, mesh: Mesh, workload: Workload, on_cpu: bool, report: Reporter) -> None:
    with Problem(workload, mesh, num_sms=stage.blocks) as problem:
        report(
            "problem",
            dict(
                workload=workload,
                traffic=problem.traffic,
                output_shape=(*problem.comm.rows_shape, workload.hidden_size),
                row_bytes=problem.row_bytes,
                arena_bytes=problem.comm.arena_bytes,
                blocks=stage.blocks,
                implementation=problem.comm.config.implementation,
            ),
        )
        report("total", len(ceilings.names(not on_cpu)) + ops.num_ops(workload))
        for measured in ceilings.measure_ceilings(problem):
            report("ceilings", measured)
        measured_rows = []
        for row in rows.measure_rows(problem, stage.only):
            measured_rows.append(row)
            report("row", row)
        if stage.comparisons if stage.comparisons is not None else not on_cpu:
            for comparison in comparisons.measure_all(problem, measured_rows):
                report("comparison", comparison)
    if stage.sweeps:
        for point in sweeps.measure_sweeps(workload, mesh):
            report("point", point)


def _baselines(stage: Stage, mesh: Mesh, workload: Workload, on_cpu: bool, report: Reporter) -> None:
    def begin(configuration: baselines.Configuration) -> Baseline | None:
        known = stage.known.get(configuration.key)
        if known is not None:
            return restored(Baseline, known)
        report("configuration", dict(key=configuration.key, if_failed=configuration.failed("")))
        return None

    # Stock JAX has one mode.
    with Problem(workload, mesh, mode=MoEMode.HIGH_THROUGHPUT) as problem:
        report("total", baselines.num_at_most(workload, on_cpu, stage.sweep_flags, stage.only))
        measured = baselines.measure_baselines(problem, sweep=stage.sweep_flags, only=stage.only, begin=begin)
        for key, baseline in measured:
            report("baseline", dict(key=key, baseline=baseline))


def _stress(stage: Stage, mesh: Mesh, workload: Workload, on_cpu: bool, report: Reporter) -> None:
    for result in stress.run_stress(workload, mesh, stage.stress_rounds):
        report("stress", result)


def _transfer(stage: Stage, mesh: Mesh, workload: Workload, on_cpu: bool, report: Reporter) -> None:
    report("total", len(ceilings.names(not on_cpu)) + transfer.NUM_ROWS)
    with Problem(workload, mesh) as problem:
        for measured in ceilings.measure_ceilings(problem):
            report("ceilings", measured)
    for row in transfer.measure_transfer(mesh, workload.hidden_size, stage.transfer_gb):
        report("row", row)


def _experts(stage: Stage, mesh: Mesh, workload: Workload, on_cpu: bool, report: Reporter) -> None:
    """Of one rank, alone on its device."""
    num_local = stage.local_experts or workload.num_experts // mesh.size
    if not stage.local_experts and workload.num_experts % mesh.size:
        raise ValueError(f"--experts: expected their number, as {workload.num_experts} is no multiple of {mesh.size}")
    one = experts.Experts(Mesh(mesh.devices[:1], (AXIS,), axis_types=(AxisType.Auto,)), workload, num_local)
    report("experts", one.description)
    report("total", len(experts.cases(stage.only)))
    for product in experts.measure_experts(one, stage.only):
        report("product", product)


_STAGES = dict(ours=_ours, baselines=_baselines, stress=_stress, transfer=_transfer, experts=_experts)


def main() -> None:
    stage = Stage(**json.loads(sys.argv[1]))
    _die_with_parent(stage.parent)
    report = Reporter(stage.events)
    mesh = _connect(stage)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    report("environment", _environment(mesh))
    _STAGES[stage.name](stage, mesh, _workload(stage, on_cpu), on_cpu, report)


if __name__ == "__main__":
    main()
