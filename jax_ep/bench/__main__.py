"""Measures dispatch and combine on the devices of this machine, beside the pure-JAX reference and a plain copy.

    python -m jax_ep.bench                       # what suits the machine
    python -m jax_ep.bench --workload train-4k --json out.json

On a machine without GPUs it runs on `--devices` virtual CPU devices.
"""

from __future__ import annotations

import argparse
import os
import sys

from jax_ep.bench import report
from jax_ep.bench.workloads import WORKLOADS


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jax_ep.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="default: train-4k on GPUs, cpu-2k elsewhere")
    parser.add_argument("--devices", type=int, help="ranks; default: all GPUs, or 8 virtual CPU devices")
    parser.add_argument("--skip-reference", action="store_true", help="measure our ops only")
    parser.add_argument("--only", help="measure the rows whose name contains this")
    parser.add_argument("--json", metavar="PATH", help="write all numbers there")
    return parser.parse_args()


def _use_virtual_cpu_devices(count: int) -> None:
    """Where there is no GPU; has to be said before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()


def main() -> int:
    arguments = _parse_arguments()
    _use_virtual_cpu_devices(arguments.devices or 8)
    import jax

    from jax_ep.bench import rows

    devices = jax.devices()[: arguments.devices]
    on_cpu = devices[0].platform == "cpu"
    mesh = jax.make_mesh((len(devices),), (rows.AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    workload = WORKLOADS[arguments.workload or ("cpu-2k" if on_cpu else "train-4k")]
    implementations = [devices[0].platform.replace("gpu", "cuda")]
    if not arguments.skip_reference:
        implementations.append("reference")

    progress = report.Progress(8 * len(implementations))
    measured: list[rows.Row] = []
    copies = {}
    for implementation in implementations:
        problem = rows.Problem(workload, mesh, implementation)
        for row in rows.measure_rows(problem, implementation, arguments.only):
            measured.append(row)
            if row.name not in copies:
                copies[row.name] = rows.measure_copy(problem, row.local_rows)
            progress.step(f"{implementation}: {row.name}")
        traffic, arena_bytes = problem.traffic, problem.comm.arena_bytes
        problem.comm.destroy()
    progress.close()
    if jax.process_index() == 0:
        _print(workload, traffic, measured, copies, implementations)
        if arguments.json:
            report.write_json(
                arguments.json,
                dict(environment=report.environment(), workload=workload, traffic=traffic, rows=measured,
                     copies=copies, arena_bytes=arena_bytes),
            )  # fmt: skip
    return 0


def _print(workload, traffic, measured, copies, implementations) -> None:
    print("  ".join(f"{name} {value}" for name, value in report.environment().items()))
    print(
        f"{workload.name}: T={workload.num_tokens} H={workload.hidden_size} E={workload.num_experts} "
        f"K={workload.topk} bfloat16, capacity {workload.capacity} rows; the most loaded rank receives "
        f"{traffic.rows_received} rows, {traffic.rows_over_link} rows cross its link.\n"
    )
    by_key = {(row.name, row.implementation): row for row in measured}
    header = ["op", "us", "spread", "copy us", "x copy", "link GB/s"]
    if "reference" in implementations:
        header += ["reference us", "x faster"]
    lines = []
    for name in dict.fromkeys(row.name for row in measured):
        row = by_key[name, implementations[0]]
        copy = copies[name].median
        link_bytes = row.link_passes * traffic.rows_over_link * workload.hidden_size * 2
        line = [
            name, f"{row.times.median * 1e6:.1f}", f"{row.times.spread:.1%}", f"{copy * 1e6:.1f}",
            f"{row.times.median / copy:.2f}", f"{link_bytes / row.times.median / 1e9:.1f}",
        ]  # fmt: skip
        if "reference" in implementations:
            reference = by_key[name, "reference"].times.median
            line += [f"{reference * 1e6:.1f}", f"{reference / row.times.median:.1f}"]
        lines.append(line)
    print(report.format_table(header, lines))
    print("\nus: median per call, chained inside one jitted program; spread: half the repeats' range over the median.")
    print("copy us: a copy, in a program of the same kind, that reads and writes as many rows on every device.")


if __name__ == "__main__":
    sys.exit(main())
