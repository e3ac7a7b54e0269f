"""Says what this machine has, whether jax_ep works on it, and what to do where it does not.

    python -m jax_ep.doctor
    python -m jax_ep.doctor --json out.json --plot out.png
    python -m jax_ep.doctor --hidden-size 7168 --num-experts 256 --topk 8 --max-tokens 4096   # memory of an arena

It uses the devices that your own program would: set XLA_FLAGS and CUDA_VISIBLE_DEVICES as there. The exit status is 1
if a self-test failed or something is unusable, else 0; warnings do not fail.
"""

from __future__ import annotations

import argparse
import sys

import jax

from jax_ep import MoECommunicatorConfig, MoEMode
from jax_ep.bench import plot
from jax_ep.doctor import arena, diagnosis, links, machine, render, selftest
from jax_ep.doctor.findings import Findings

_SIZES = ("hidden_size", "num_experts", "topk", "max_tokens")


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_ep.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write all findings there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw bandwidth and latency between devices there")
    parser.add_argument("--skip-links", action="store_true", help="do not measure them")
    sizes = parser.add_argument_group("memory of an arena", "all four sizes, for the answer over all devices")
    sizes.add_argument("--hidden-size", type=int, metavar="H")
    sizes.add_argument("--num-experts", type=int, metavar="E", help="over all ranks")
    sizes.add_argument("--topk", type=int, metavar="K", help="experts per token")
    sizes.add_argument("--max-tokens", type=int, metavar="T", help="max_tokens_per_rank")
    sizes.add_argument("--mode", choices=[mode.value for mode in MoEMode], default=MoEMode.HIGH_THROUGHPUT.value)
    sizes.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    sizes.add_argument("--max-requests", type=int, default=0, metavar="N", help="of dispatch_async and combine_async")
    arguments = parser.parse_args(given)
    missing = [name for name in _SIZES if getattr(arguments, name) is None]
    if 0 < len(missing) < len(_SIZES):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        parser.error(f"the memory of an arena also depends on {options}")
    if arguments.plot and arguments.skip_links:
        parser.error("--plot draws what --skip-links leaves out")
    if arguments.plot and not plot.is_available():
        parser.error(plot.MISSING)
    return arguments


def configuration(arguments: argparse.Namespace) -> MoECommunicatorConfig | None:
    """The communicator whose arena was asked for."""
    if arguments.hidden_size is None:
        return None
    return MoECommunicatorConfig(
        num_experts=arguments.num_experts,
        hidden_size=arguments.hidden_size,
        topk=arguments.topk,
        max_tokens_per_rank=arguments.max_tokens,
        mode=MoEMode(arguments.mode),
        dtype=arguments.dtype,
        max_requests=arguments.max_requests,
    )


def collect(config: MoECommunicatorConfig | None = None, *, skip_links: bool = False) -> Findings:
    """Everything, diagnosed."""
    devices = jax.local_devices()
    findings = Findings(
        machine=machine.collect_machine(),
        self_tests=list(selftest.run_self_tests()),
        links=None if skip_links else links.measure_links(devices),
        arena=None if config is None else arena.measure_arena(config, devices),
    )
    findings.problems.extend(diagnosis.diagnose(findings))
    return findings


def main(given: list[str] | None = None) -> int:
    """The command."""
    arguments = parse_arguments(given)
    findings = collect(configuration(arguments), skip_links=arguments.skip_links)
    print(render.render(findings))
    if arguments.json:
        render.write_json(arguments.json, findings)
    if arguments.plot:
        if findings.links is None:
            print(f"--plot: {arguments.plot} is not written: fewer than 2 devices", file=sys.stderr)
        else:
            render.write_plot(arguments.plot, findings.links)
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
