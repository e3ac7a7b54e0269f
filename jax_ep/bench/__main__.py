"""Measures dispatch and combine on the devices of this machine, beside its ceilings and stock JAX.

    python -m jax_ep.bench                                   # what suits the machine
    python -m jax_ep.bench --workload decode --json out.json
    python -m jax_ep.bench --processes 4                     # one process per GPU
    python -m jax_ep.bench --stress 20000                    # checks instead of times
    python -m jax_ep.bench --transfer                        # experts that move between ranks
    python -m jax_ep.bench --experts                         # the experts' grouped matrix product

On a machine without GPUs it runs on `--devices` virtual CPU devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable
from typing import Any

from jax_ep.bench import plot, report
from jax_ep.bench.results import Baseline, Ceilings, Comparison, Point, Product, Row, StressResult, restored
from jax_ep.bench.stages import Stage, StageFailed, run_resiliently, run_stage
from jax_ep.bench.workloads import WORKLOADS

_KINDS: dict[str, Callable] = dict(
    row=lambda data: restored(Row, data),
    comparison=lambda data: restored(Comparison, data),
    product=lambda data: restored(Product, data),
    point=lambda data: Point(**(data | dict(row=restored(Row, data["row"])))),
)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jax_ep.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="default: train-4k on GPUs, cpu-2k elsewhere")
    parser.add_argument("--devices", type=int, help="ranks; default: all GPUs, or 8 virtual CPU devices")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="as many processes, each with its GPU")
    parser.add_argument("--only", metavar="TEXT", help="measure rows whose name contains it")
    parser.add_argument("--blocks", type=int, metavar="N", help="num_sms of the communicator that is measured")
    parser.add_argument("--skip-stock", action="store_true", help="no baselines")
    parser.add_argument("--skip-flags", action="store_true", help="baselines with XLA's default flags only")
    parser.add_argument(
        "--comparisons",
        action=argparse.BooleanOptionalAction,
        help="dispatch beside a matrix product, command buffers, few blocks; default: on GPUs",
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--stress", type=int, metavar="N", help="N checked rounds of changing routing, nothing else")
    alone.add_argument(
        "--transfer",
        type=float,
        nargs="?",
        const=0.0,
        metavar="GB",
        help="experts of so many GB move between ranks, nothing else; default 8 on GPUs, 0.05 elsewhere",
    )
    alone.add_argument(
        "--experts",
        type=int,
        nargs="?",
        const=0,
        metavar="L",
        help="a grouped matrix product of a rank with L experts, nothing else; default the workload's over all devices",
    )
    parser.add_argument("--json", metavar="PATH", help="write all numbers there")
    parser.add_argument("--plot", metavar="PATH.png", help="sweep block and token counts, and draw them there")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="for each stage; default 3600")
    parser.add_argument(
        "--baseline-timeout",
        type=float,
        default=180.0,
        metavar="S",
        help="seconds after which a silent baseline counts as hung; default 180",
    )
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error("--processes: at least 1")
    if arguments.devices and arguments.devices % arguments.processes:
        parser.error("--devices: a multiple of --processes")
    if arguments.experts is not None and (arguments.experts < 0 or arguments.processes > 1):
        parser.error("--experts: at least 1, in one process")
    if arguments.plot and not plot.is_available():
        parser.error(plot.MISSING)
    return arguments


class Run:
    """What the stages said so far."""

    def __init__(self, baseline_timeout_s: float) -> None:
        self._baseline_timeout_s = baseline_timeout_s
        self.environment: dict[str, str] = {}
        self.problem: dict[str, Any] = {}
        self.ceilings = Ceilings(None, None, None, {})
        self.measured: dict[str, list] = {kind: [] for kind in _KINDS}
        self.baselines: dict[str, Baseline] = {}
        self.stress: StressResult | None = None
        self.experts: dict[str, Any] = {}
        self.failed_stages: dict[str, str] = {}
        self._progress = report.Progress()

    def hear(self, kind: str, content) -> None:
        match kind:
            case "environment":
                self.environment = content
            case "problem":
                self.problem = content
            case "total":
                self._progress.expect(content)
            case "ceilings":
                self.ceilings = Ceilings(**content)
                self._progress.step("ceilings")
            case "baseline":
                self.baselines[content["key"]] = restored(Baseline, content["baseline"])
                self._progress.step(report.outcome(f"stock {content['key']}", self.baselines[content["key"]]))
            case "stress":
                self.stress = StressResult(**content)
                self._progress.step(f"{self.stress.rounds} rounds")
            case "experts":
                self.experts = content
            case "row" | "comparison" | "product":
                self.measured[kind].append(_KINDS[kind](content))
                self._progress.step(report.outcome(content["name"], self.measured[kind][-1]))
            case "point":
                point = _KINDS[kind](content)
                self.measured[kind].append(point)
                self._progress.step(report.outcome(f"{point.row.name}, {point.value} {point.axis}", point.row))

    def stage(self, stage: Stage, timeout_s: float) -> None:
        """Runs it to its end, good or bad."""
        try:
            if stage.name == "baselines":
                run_resiliently(stage, self.hear, timeout_s=timeout_s, silence_s=self._baseline_timeout_s)
            else:
                for kind, content in run_stage(stage, timeout_s=timeout_s):
                    self.hear(kind, content)
        except StageFailed as failure:
            self.failed_stages[stage.name] = str(failure)
        except KeyboardInterrupt:  # what was measured so far is worth having
            self.failed_stages[stage.name] = "interrupted"
        finally:
            self._progress.close()

    @property
    def interrupted(self) -> bool:
        return "interrupted" in self.failed_stages.values()

    @property
    def ok(self) -> bool:
        """Baselines may fail: they are not ours."""
        failed = [measured for measured in self.measured["row"] + self.measured["product"] if measured.error]
        wrong = self.stress is not None and self.stress.wrong_sums + self.stress.wrong_rows > 0
        return not failed and not wrong and not set(self.failed_stages) - {"baselines"}


def main() -> int:
    arguments = _parse_arguments()
    stage = Stage(
        name="ours",
        workload=arguments.workload,
        devices=arguments.devices,
        num_processes=arguments.processes,
        only=arguments.only,
        blocks=arguments.blocks,
        comparisons=arguments.comparisons,
        sweeps=arguments.plot is not None,
        sweep_flags=not arguments.skip_flags,
        stress_rounds=arguments.stress or 0,
        transfer_gb=arguments.transfer or 0.0,
        local_experts=arguments.experts or 0,
    )
    names = ["ours"] + ["baselines"] * (not arguments.skip_stock)
    run = Run(arguments.baseline_timeout)
    # Whoever ends it still gets what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    alone = dict(stress=arguments.stress or None, transfer=arguments.transfer, experts=arguments.experts)
    names = [name for name, wanted in alone.items() if wanted is not None] or names
    for name in names:
        if not run.interrupted:
            run.stage(dataclasses.replace(stage, name=name), arguments.timeout)
    _print(run)
    if arguments.json:
        report.write_json(arguments.json, _everything(run))
    if arguments.plot and run.measured["point"]:
        workload = run.problem["workload"]["name"]
        plot.write_plot(
            arguments.plot, run.measured["point"], run.ceilings, f"{workload}, {run.environment['devices']}"
        )
    return 0 if run.ok else 1


def _print(run: Run) -> None:
    report.print_environment(run.environment)
    if run.problem:
        report.print_problem(run.problem, run.ceilings)
        report.print_rows(run.measured["row"], run.ceilings, list(run.baselines.values()))
    elif run.measured["row"]:
        report.print_transfer(run.measured["row"], run.ceilings)
    if run.experts:
        report.print_products(run.experts, run.measured["product"])
    if run.measured["comparison"]:
        report.print_comparisons(run.measured["comparison"])
    if run.baselines:
        report.print_baselines(list(run.baselines.values()))
    if run.problem:
        report.print_peers(run.problem["workload"]["name"])
    if run.stress:
        report.print_stress(run.stress)
    for name, reason in run.failed_stages.items():
        print(f"\nStage {name} failed: {reason}", file=sys.stderr)


def _everything(run: Run) -> dict[str, Any]:
    return dict(
        command=["python", "-m", "jax_ep.bench", *sys.argv[1:]],
        environment=run.environment,
        problem=run.problem,
        ceilings=run.ceilings,
        rows=[report.summary(row, run.ceilings, list(run.baselines.values())) for row in run.measured["row"]],
        comparisons=run.measured["comparison"],
        baselines=run.baselines,
        points=run.measured["point"],
        stress=run.stress,
        experts=run.experts,
        products=[report.product_summary(product) for product in run.measured["product"]],
        failed_stages=run.failed_stages,
        peers=report.peers_of(run.problem),
    )


if __name__ == "__main__":
    sys.exit(main())
