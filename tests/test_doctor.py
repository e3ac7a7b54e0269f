"""The doctor finds what there is, says what is wrong, and its command's exit status tells."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import jax_ep
from jax_ep import MoECommunicatorConfig, MoEMode
from jax_ep.bench import ceilings
from jax_ep.doctor import __main__ as command
from jax_ep.doctor import arena, diagnosis, links, machine, render, selftest
from jax_ep.doctor.findings import Arena, Device, Extension, Findings, Gpu, Links, Machine, SelfTest

TIMEOUT_S = 200
CONFIG = MoECommunicatorConfig(num_experts=8, hidden_size=64, topk=2, max_tokens_per_rank=16)

CPU_MACHINE = Machine(
    versions=dict(jax="0.11.2"),
    devices=[Device(i, "cpu", "cpu", 0) for i in range(2)],
    num_processes=1,
    process=0,
    gpus=[],
    extensions=[Extension("cpu"), Extension("cuda", "No module named 'jax_ep._cuda'")],
    environment={},
    host="a pid:[1]",
    ptrace_scope=None,
    processes_apart=None,
)
GPU_MACHINE = dataclasses.replace(
    CPU_MACHINE,
    devices=[Device(i, "gpu", "NVIDIA H200", 0, "9.0", 105 << 30) for i in range(2)],
    gpus=[Gpu("NVIDIA H200", "580.1", 140 << 30)] * 2,
    extensions=[Extension("cpu"), Extension("cuda")],
    environment=dict(XLA_FLAGS="--xla_gpu_enable_command_buffer="),
)
LINKS = Links("GPU peer access", "stores", [0, 1], [[None, 1e9], [9e9, None]], [[None, 1e-6], [1e-6, None]], "flag", {})


# What there is.


def test_machine():
    found = machine.collect_machine()
    assert [device.id for device in found.devices] == [device.id for device in jax.local_devices()]
    assert found.versions["jax"] == jax.__version__ and found.versions["jax_ep"] == jax_ep.__version__
    assert "host_platform_device_count" in found.environment["XLA_FLAGS"]
    assert found.extension_error("cpu") is None and found.processes_apart is None and found.host


def test_extension_that_does_not_load(monkeypatch):
    def fails(name):
        raise NotImplementedError("no extension") from ImportError("libcudart.so.13: no such file")

    monkeypatch.setattr(machine._ffi, "extension", fails)
    assert machine.extension_error("cuda") == "ImportError: libcudart.so.13: no such file"


def test_memory_that_others_cannot_open(monkeypatch):
    monkeypatch.setattr(machine, "_OPEN_MEMORY", "raise SystemExit('Permission denied')")
    assert machine.what_keeps_processes_apart() == "Permission denied"


def test_gpus_of_nvidia_smi(monkeypatch, tmp_path):
    listed = "NVIDIA H200, 580.95.05, 143771\nNo devices were found\nNVIDIA H200, 580.95.05, [N/A]\n"
    assert machine.parse_gpus(listed) == [Gpu("NVIDIA H200", "580.95.05", 143771 << 20)]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_gpus() == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.nvidia_gpus() == []


# Self-tests.


def test_backends_of_this_machine():
    available = selftest.available()
    assert {"reference", "cpu"} <= set(available)
    assert len(available["cpu"]) == len(jax.local_devices(backend="cpu"))


def test_self_test_finds_wrong_results(monkeypatch):
    devices = jax.devices("cpu")[:2]
    selftest.check_layer("cpu", MoEMode.HIGH_THROUGHPUT, devices)
    combine = jax_ep.MoECommunicator.combine
    monkeypatch.setattr(jax_ep.MoECommunicator, "combine", lambda *args: combine(*args).at[0, 3].add(1))
    with pytest.raises(AssertionError, match="the output: 2 of 256 elements are wrong"):
        selftest.check_layer("cpu", MoEMode.LOW_LATENCY, devices)


# Links and memory.


def test_links_by_copies(monkeypatch):
    monkeypatch.setattr(links, "_CPU_COPY_BYTES", 1 << 16)
    devices = jax.devices("cpu")
    assert links.measure_links(devices[:1]) is None
    found = links.measure_links(devices[:3])
    assert found.devices == [0, 1, 2] and not found.errors and "device_put" in found.method
    for matrix in (found.bytes_per_s, found.latency_s):
        assert [[value is None for value in row] for row in matrix] == np.eye(3, dtype=bool).tolist()
        assert all(value > 0 for row in matrix for value in row if value is not None)


def test_links_by_stores(monkeypatch):
    """On CPU devices, with the measurements of GPUs replaced: pairs count for both directions, and may fail."""

    def store_rate(problem):
        first, second = problem.mesh.devices.flat
        if second.id == 2:
            raise RuntimeError(f"no peer access between {first.id} and {second.id}")
        return 4e9

    monkeypatch.setattr(ceilings, "_store_rate", store_rate)
    monkeypatch.setattr(ceilings, "_flag_round_trip", lambda problem: 3e-6)
    monkeypatch.setattr(links, "_STORES", dataclasses.replace(links._STORES, num_tokens=2, hidden_size=8))
    found = links.by_stores(jax.devices("cpu")[:3], left_out=1)
    assert found.bytes_per_s == [[None, 4e9, None], [4e9, None, None], [None] * 3] and found.left_out == 1
    assert found.latency_s[0][1] == found.latency_s[1][0] == 1.5e-6
    assert found.errors == {f"{i} and 2": f"RuntimeError: no peer access between {i} and 2" for i in (0, 1)}


@pytest.mark.parametrize("has_kernels, works", [(True, True), (True, False), (False, True)])
def test_gpus_without_kernels_are_measured_by_copies(monkeypatch, has_kernels, works):
    nothing = [[None, None], [None, None]]
    stores = LINKS if works else dataclasses.replace(LINKS, bytes_per_s=nothing, errors={"0 and 1": "no peer access"})
    copies = dataclasses.replace(LINKS, method="copies")
    monkeypatch.setattr(links, "_has_kernels", lambda: has_kernels)
    monkeypatch.setattr(links, "by_stores", lambda devices, left_out: stores)
    monkeypatch.setattr(links, "by_copies", lambda devices, left_out: copies)
    found = links.measure_links([types.SimpleNamespace(platform="gpu")] * 2)
    assert found.method == ("stores" if has_kernels and works else "copies")
    assert found.errors == ({} if works else stores.errors)


def test_arena():
    devices = jax.devices("cpu")[:2]
    found = arena.measure_arena(CONFIG, devices)
    assert (found.implementation, found.bytes, found.error) == ("cpu", 0, None)
    assert "address space" in found.meaning and "not known on this machine" in found.meaning
    assert found.configuration["num_ranks"] == 2 and found.configuration["mode"] == "high_throughput"
    by_reference = arena.measure_arena(dataclasses.replace(CONFIG, implementation="reference"), devices)
    assert by_reference.bytes == 0 and "has no arena" in by_reference.meaning
    unusable = arena.measure_arena(dataclasses.replace(CONFIG, num_experts=7), devices)
    assert unusable.bytes is None and "num_experts: expected a multiple of the 2 ranks, got 7" in unusable.error


# What is wrong.


def diagnosed(machine: Machine, self_tests=(), links=None, arena=None) -> list[tuple[str, str]]:
    findings = Findings(machine, list(self_tests), links, arena)
    return [(problem.severity, f"{problem.what} -> {problem.remedy}") for problem in diagnosis.diagnose(findings)]


def test_machines_without_problems():
    assert diagnosed(CPU_MACHINE) == diagnosed(GPU_MACHINE) == []


NO_CPU, NO_CUDA = [Extension("cpu", "gone"), Extension("cuda")], [Extension("cpu"), Extension("cuda", "gone")]


@pytest.mark.parametrize(
    "found, changes, severity, what",
    [
        (CPU_MACHINE, dict(versions=dict(jax="0.9.2")), "error", "jax 0.9.2 is older than 0.10.2"),
        (CPU_MACHINE, dict(versions=dict(jax="0.12.0.dev1")), "note", "newer than what"),
        (GPU_MACHINE, dict(versions=dict(jax="0.11.0")), "note", "before 0.11.1"),
        (CPU_MACHINE, dict(devices=CPU_MACHINE.devices[:1]), "warning", "xla_force_host_platform_device_count=8"),
        (GPU_MACHINE, dict(devices=GPU_MACHINE.devices[:1]), "warning", "CUDA_VISIBLE_DEVICES"),
        (CPU_MACHINE, dict(gpus=GPU_MACHINE.gpus), "warning", "pip install 'jax[cuda13]'"),
        (CPU_MACHINE, dict(gpus=GPU_MACHINE.gpus, environment=dict(JAX_PLATFORMS="cpu")), "warning", "unset JAX_PLAT"),
        (CPU_MACHINE, dict(extensions=NO_CPU), "error", "cpu extension does not load: gone -> reinstall"),
        (GPU_MACHINE, dict(extensions=NO_CPU), "warning", "cpu extension does not load: gone"),
        (GPU_MACHINE, dict(extensions=NO_CUDA), "error", "JAX_EP_CUDA=on pip install"),
        (CPU_MACHINE, dict(processes_apart="Denied", ptrace_scope="3"), "warning", "ptrace_scope is 3), which CPU gro"),
        (GPU_MACHINE, dict(devices=[Device(0, "gpu", "A100", 0, "8.0")] * 2), "error", "compute capability 8.0"),
        (GPU_MACHINE, dict(environment={}), "note", "command buffers are on"),
        (GPU_MACHINE, dict(gpus=[Gpu("H200", "1", 105 << 30)]), "warning", "JAX's default leaves 0 MiB"),
    ],
)
def test_problems_of_a_machine(found, changes, severity, what):
    ((got_severity, got),) = diagnosed(dataclasses.replace(found, **changes))
    assert got_severity == severity and what in got


def test_room_beside_the_pool():
    assert diagnosis.room_beside_pool(CPU_MACHINE) is None
    assert diagnosis.room_beside_pool(GPU_MACHINE) == 35 << 30
    no_stats = dataclasses.replace(GPU_MACHINE, devices=[Device(0, "gpu", "H200", 0)])
    assert diagnosis.room_beside_pool(no_stats) == 35 << 30
    no_pool = dataclasses.replace(GPU_MACHINE, environment=dict(XLA_PYTHON_CLIENT_ALLOCATOR="platform"))
    assert diagnosis.room_beside_pool(no_pool) == 140 << 30


@pytest.mark.parametrize("name", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"])
def test_the_variable_that_is_set_is_named(name):
    """JAX refuses both at once."""
    small = dataclasses.replace(GPU_MACHINE, environment=GPU_MACHINE.environment | {name: ".9"})
    ((severity, got),) = diagnosed(small, arena=Arena({}, "cuda", 36 << 30, ""))
    assert severity == "warning" and f"{name}=.9 leaves" in got and got.endswith(f"-> lower {name}")


def test_gpus_of_another_maker():
    other = dataclasses.replace(GPU_MACHINE.devices[0], compute_capability="gfx942")
    problems = diagnosed(dataclasses.replace(GPU_MACHINE, devices=[other, other]))
    assert ("error", True) in [(severity, "compute capability gfx942" in got) for severity, got in problems]


def test_the_last_flag_counts():
    off, on = "--xla_gpu_enable_command_buffer=", "--xla_gpu_enable_command_buffer=FUSION"
    for flags, is_on in ((f"{off} {on}", True), (f"{on} {off}", False), (f'{off}""', False), ("", True)):
        machine = dataclasses.replace(GPU_MACHINE, environment=dict(XLA_FLAGS=flags))
        assert any("command buffers are on" in got for _, got in diagnosed(machine)) == is_on, flags


def test_problems_of_measurements():
    test = SelfTest("cuda", "low_latency", 2, 1.0, "RuntimeError: ranks 0 and 1: no peer access between these GPUs\n")
    needs_more = Arena({}, "cuda", 36 << 30, "")
    failed = dataclasses.replace(LINKS, errors={"0 and 1": "RuntimeError: no peer access"})
    problems = diagnosed(GPU_MACHINE, [test], failed, needs_more)
    assert [severity for severity, _ in problems] == ["error", "warning", "warning", "note"]
    for (_, got), text in zip(
        problems,
        ("no peer access between these GPUs -> choose GPUs", "devices 0 and 1:", "which need 36864 MiB", "1 GB/s, the"),
        strict=True,
    ):
        assert text in got
    ((severity, got),) = diagnosed(
        GPU_MACHINE, arena=dataclasses.replace(needs_more, bytes=None, error="TypeError: no")
    )
    assert severity == "error" and "the given configuration: TypeError: no" in got
    others = [("cannot allocate 5 MiB", "MEM_FRACTION"), ("PeerTimeoutError: ", "busy"), ("what", "report it")]
    for error, remedy in others:
        ((severity, got),) = diagnosed(GPU_MACHINE, [dataclasses.replace(test, error=error)])
        assert severity == "error" and remedy in got


def test_text_names_every_problem():
    test = SelfTest("cpu", "low_latency", 2, 1.0, "ValueError: wrong")
    findings = Findings(GPU_MACHINE, [test], LINKS, Arena(dict(topk=2), "cuda", None, "why", "TypeError: no"))
    findings.problems.extend(diagnosis.diagnose(findings))
    text = render.render(findings)
    for problem in findings.problems:
        assert f"{problem.severity}: {problem.what}\n  -> {problem.remedy}" in text
    assert "2x NVIDIA H200, compute capability 9.0" in text and "FAILED" in text and "topk=2: not known" in text
    assert text.endswith("jax_ep does not work here as it should: 2 errors, 1 note.")


# The command.


def test_command(tmp_path):
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    sizes = "--hidden-size 64 --num-experts 8 --topk 2 --max-tokens 16 --mode low_latency".split()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_ep.doctor", "--json", file, "--plot", picture, *sizes],
        env=os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("2x cpu", "cpu loads", "GB/s, from \\ to", "device_put", "mode=low_latency", "jax_ep works here"):
        assert text in done.stdout
    found = json.loads(file.read_text())
    assert found["ok"] and len(found["machine"]["devices"]) == 2 and found["arena"]["bytes"] == 0
    modes = ["high_throughput", "low_latency"]
    tests = [(test["implementation"], test["mode"], test["error"]) for test in found["self_tests"]]
    assert tests == [(name, mode, None) for name in ("reference", "cpu") for mode in modes]
    assert found["links"]["bytes_per_s"][0][1] > 0 and found["links"]["latency_s"][1][0] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_exit_status(monkeypatch, capsys, tmp_path):
    def check_layer(implementation, mode, devices):
        if implementation == "cpu" and mode is MoEMode.LOW_LATENCY:
            raise AssertionError("the output: 3 of 4 elements are wrong")

    file = tmp_path / "out.json"
    monkeypatch.setattr(machine, "collect_machine", lambda: CPU_MACHINE)
    monkeypatch.setattr(selftest, "check_layer", lambda *_: None)
    assert command.main(["--skip-links"]) == 0
    assert "jax_ep works here" in capsys.readouterr().out
    monkeypatch.setattr(selftest, "check_layer", check_layer)
    assert command.main(["--skip-links", "--json", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "error: self-test of cpu, low_latency: AssertionError: the output: 3 of 4 elements are wrong" in printed
    assert not json.loads(file.read_text())["ok"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["--topk", "2"], "also depends on --hidden-size, --num-experts, --max-tokens"),
        (["--plot", "out.png", "--skip-links"], "--plot draws what --skip-links leaves out"),
    ],
)
def test_bad_command_line(capsys, given, message):
    with pytest.raises(SystemExit):
        command.parse_arguments(given)
    assert message in capsys.readouterr().err


def test_nothing_to_plot_on_one_device(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "collect_machine", lambda: CPU_MACHINE)
    monkeypatch.setattr(selftest, "check_layer", lambda *_: None)
    monkeypatch.setattr(links, "measure_links", lambda devices: None)
    assert command.main(["--plot", str(tmp_path / "out.png")]) == 0
    assert "is not written: fewer than 2 devices" in capsys.readouterr().err
