"""From what was found to what is wrong and what to do about it: pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jax_ep.doctor.findings import Arena, Findings, Links, Machine, Problem, SelfTest

_OLDEST_JAX = (0, 10, 2)
_NEXT_JAX = (0, 12)
_OVERLAPPING_JAX = (0, 11, 1)
_OLDEST_CAPABILITY = 9.0
_DEFAULT_POOL_SHARE = 0.75
# A link this much slower than the fastest is worth a word.
_SLOW_LINK = 0.5


def diagnose(findings: Findings) -> list[Problem]:
    """Errors first."""
    machine = findings.machine
    problems = [
        *_of_versions(machine),
        *_of_devices(machine),
        *_of_extensions(machine),
        *_of_processes(machine),
        *_of_self_tests(machine, findings.self_tests),
        *_of_links(machine, findings.links),
        *_of_memory(machine, findings.arena),
        *_of_overlap(machine),
    ]
    return sorted(problems, key=lambda problem: ("error", "warning", "note").index(problem.severity))


def version_tuple(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _of_versions(machine: Machine) -> Iterator[Problem]:
    jax_version = machine.versions["jax"]
    if version_tuple(jax_version) < _OLDEST_JAX:
        yield Problem("error", f"jax {jax_version} is older than 0.10.2", "pip install 'jax>=0.10.2'")
    elif version_tuple(jax_version) >= _NEXT_JAX:
        yield Problem("note", f"jax {jax_version} is newer than what jax_ep was tested with", "if it fails, try 0.11")


def _of_devices(machine: Machine) -> Iterator[Problem]:
    if machine.gpus and machine.platform != "gpu":
        chosen = machine.environment.get("JAX_PLATFORMS")
        remedy = f"unset JAX_PLATFORMS={chosen}" if chosen else "pip install 'jax[cuda13]', with a driver for CUDA 13"
        yield Problem("warning", f"nvidia-smi lists {len(machine.gpus)} GPUs, but JAX uses {machine.platform}", remedy)
    for capability in sorted({d.compute_capability for d in machine.devices if d.compute_capability}):
        is_cuda = re.fullmatch(r"\d+\.\d+", capability) is not None  # gfx942 and the like are AMD's
        if not is_cuda or float(capability) < _OLDEST_CAPABILITY:
            what = f"compute capability {capability}: jax_ep's kernels need {_OLDEST_CAPABILITY} (H100) or newer"
            yield Problem("error", what, 'choose implementation="reference"')
    if len(machine.devices) >= 2 or machine.num_processes > 1:
        return
    if machine.platform == "cpu":
        what = "1 CPU device: tokens have nowhere to go"
        remedy = "XLA_FLAGS=--xla_force_host_platform_device_count=8 in the environment gives 8"
    else:
        what = "1 device: tokens have nowhere to go"
        remedy = "make more visible (CUDA_VISIBLE_DEVICES), or start a process per GPU with jax.distributed"
    yield Problem("warning", what, remedy)


def _of_extensions(machine: Machine) -> Iterator[Problem]:
    if error := machine.extension_error("cpu"):
        yield Problem(
            "error" if machine.platform == "cpu" else "warning",
            f"the cpu extension does not load: {error}",
            'reinstall jax_ep from its sources (pip install .), or choose implementation="reference"',
        )
    if machine.platform == "gpu" and (error := machine.extension_error("cuda")):
        yield Problem(
            "error",
            f"the cuda extension does not load, so communicators over GPUs cannot be built: {error}",
            "JAX_EP_CUDA=on pip install '.[cuda13]' from jax_ep's sources, or choose implementation=\"reference\"",
        )


def _of_processes(machine: Machine) -> Iterator[Problem]:
    if machine.processes_apart is not None:
        scope = "" if machine.ptrace_scope is None else f" (kernel.yama.ptrace_scope is {machine.ptrace_scope})"
        yield Problem(
            "warning",
            f"processes cannot open each other's memory{scope}, which CPU groups of several processes need: "
            f"{machine.processes_apart}",
            "run them as the same user, in one container and pid namespace, with /proc mounted and without hidepid; or "
            'use one process, or implementation="reference"',
        )


def _of_self_tests(machine: Machine, self_tests: list[SelfTest]) -> Iterator[Problem]:
    for test in self_tests:
        if test.error is None:
            continue
        if "no peer access" in test.error:
            remedy = (
                "choose GPUs that reach each other, see nvidia-smi topo -p2p r, and the settings of container and IOMMU"
            )
        elif "cannot allocate" in test.error:
            remedy = f"lower {_pool_setting(machine)}, and see who else uses the GPUs (nvidia-smi)"
        elif "PeerTimeoutError" in test.error:
            remedy = "see whether other programs keep the devices busy, and run it again"
        else:
            remedy = "if installed from other sources than the running jax_ep, reinstall; otherwise please report it"
        name = f"self-test of {test.implementation}, {test.mode}"
        yield Problem("error", f"{name}: {test.error.strip().splitlines()[0]}", remedy)


def _of_links(machine: Machine, links: Links | None) -> Iterator[Problem]:
    if links is None:
        return
    for pair, error in links.errors.items():
        remedy = "leave one of them out of the mesh (CUDA_VISIBLE_DEVICES), or see nvidia-smi topo -p2p r"
        yield Problem("warning", f"devices {pair}: {error}", remedy)
    rates = [rate for row in links.bytes_per_s for rate in row if rate]
    if machine.platform == "gpu" and rates and min(rates) < _SLOW_LINK * max(rates):
        what = f"the slowest link has {min(rates) / 1e9:.0f} GB/s, the fastest {max(rates) / 1e9:.0f}"
        yield Problem("note", what, "an op is as slow as its slowest link; nvidia-smi topo -m shows what connects GPUs")


def room_beside_pool(machine: Machine) -> int | None:
    """Bytes of the smallest GPU that JAX's pool leaves to others; None where that is not known.

    `memory_stats` tells how large the pool may grow, and nvidia-smi how large the GPU is.
    """
    pools = [device.pool_bytes for device in machine.devices if device.pool_bytes]
    totals = [gpu.total_bytes for gpu in machine.gpus]
    if machine.platform != "gpu" or not totals:
        return None
    if machine.environment.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":  # which keeps no pool
        return min(totals)
    return min(totals) - (max(pools) if pools else int(_DEFAULT_POOL_SHARE * min(totals)))


def _of_memory(machine: Machine, arena: Arena | None) -> Iterator[Problem]:
    if arena is not None and arena.error is not None:
        yield Problem("error", f"the given configuration: {arena.error.strip().splitlines()[0]}", "see what it names")
    room = room_beside_pool(machine)
    if room is None:
        return
    name = _pool_setting(machine)
    fraction = machine.environment.get(name)
    setting = f"{name}={fraction}" if fraction else "JAX's default"
    needed = arena.bytes if arena is not None and arena.bytes is not None else 0
    if room < max(needed, 1 << 30):
        what = f"{setting} leaves {room / 2**20:.0f} MiB of a GPU for arenas" + (
            f", which need {needed / 2**20:.0f} MiB" if needed else ""
        )
        yield Problem("warning", what, f"lower {name}")


def _pool_setting(machine: Machine) -> str:
    """The variable that says how much of a GPU is JAX's: JAX reads two, and refuses both at once."""
    new = "XLA_CLIENT_MEM_FRACTION"
    return new if new in machine.environment else "XLA_PYTHON_CLIENT_MEM_FRACTION"


def _of_overlap(machine: Machine) -> Iterator[Problem]:
    if machine.platform != "gpu":
        return
    if version_tuple(machine.versions["jax"]) < _OVERLAPPING_JAX:
        what = "dispatch_async and combine_async hide nothing with jax before 0.11.1"
        yield Problem("note", what, "pip install -U 'jax[cuda13]', if you use them")
    # The last of several counts.
    given = re.findall(r"--xla_gpu_enable_command_buffer=(\S*)", machine.environment.get("XLA_FLAGS", ""))
    if not given or given[-1].strip("\"'"):
        yield Problem(
            "note",
            "command buffers are on: they replay one kernel after the other, so dispatch_async and combine_async hide "
            "nothing",
            'if you use them, set xla_gpu_enable_command_buffer="", in XLA_FLAGS or as a compiler option',
        )
