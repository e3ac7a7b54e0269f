"""The suite across processes, and what becomes of a group when a process leaves it or never was in it."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import suite

WORKER = pathlib.Path(__file__).with_name("worker.py")
TIMEOUT_S = 300.0
# How long the others may still run once one process failed or was killed: it may take them a timeout of their own, and
# the 10 s that leaving waits for it.
GRACE_S = 40.0


class Ended(NamedTuple):
    status: int
    output: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environment(implementation: str, process: int, devices_each: int) -> dict[str, str]:
    if implementation == "cpu":
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices_each}"
        return os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    # One process per GPU as schedulers start it, seeing no other GPU; several GPUs each by `local_device_ids`.
    return os.environ | (dict(CUDA_VISIBLE_DEVICES=str(process)) if devices_each == 1 else {})


def start(scenario: str, implementation: str, process: int, num_processes: int, devices_each: int, port: int, log):
    task = dict(
        scenario=scenario, implementation=implementation, process=process, num_processes=num_processes, port=port
    )
    if implementation == "cuda" and devices_each > 1:
        task["local_device_ids"] = [process * devices_each + i for i in range(devices_each)]
    return subprocess.Popen(
        [sys.executable, "-W", "error", WORKER, json.dumps(task)],
        env=environment(implementation, process, devices_each),
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def wait_for_all(workers: list[subprocess.Popen]) -> None:
    """Returns when all have ended, by themselves or by being killed: too late, or too long after one failed."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if any(worker.poll() for worker in workers):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.05)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def run_processes(tmp_path, scenario: str, implementation: str, num_processes: int, devices_each: int) -> list[Ended]:
    if len(suite.devices_of(implementation)) < num_processes * devices_each:
        pytest.skip(f"needs {num_processes * devices_each} {implementation} devices")
    port = free_port()
    logs = [tmp_path / f"{process}.log" for process in range(num_processes)]
    workers = []
    for process, log in enumerate(logs):
        with log.open("w") as file:
            workers.append(start(scenario, implementation, process, num_processes, devices_each, port, file))
    wait_for_all(workers)
    return [Ended(worker.returncode, log.read_text()) for worker, log in zip(workers, logs, strict=True)]


def assert_ended(processes: list[Ended], statuses: list[int]) -> None:
    logs = "\n".join(
        f"--- process {i}, status {process.status}\n{process.output}" for i, process in enumerate(processes)
    )
    assert [process.status for process in processes] == statuses, logs


@pytest.mark.parametrize("num_processes, devices_each", [(2, 1), (2, 2), (4, 1)], ids=["2x1", "2x2", "4x1"])
def test_suite(native_implementation, tmp_path, num_processes, devices_each):
    processes = run_processes(tmp_path, "suite", native_implementation, num_processes, devices_each)
    assert_ended(processes, [0] * num_processes)


@pytest.mark.parametrize("devices_each", [1, 2], ids=["2x1", "2x2"])
def test_refusals(native_implementation, tmp_path, devices_each):
    assert_ended(run_processes(tmp_path, "refusals", native_implementation, 2, devices_each), [0, 0])


def test_rebalancing(native_implementation, tmp_path):
    assert_ended(run_processes(tmp_path, "rebalancing", native_implementation, 2, 1), [0, 0])


@pytest.mark.parametrize("num_processes, devices_each", [(3, 1), (2, 2)], ids=["3x1", "2x2"])
def test_killed_peer(native_implementation, tmp_path, num_processes, devices_each, shared_memory_files):
    before = shared_memory_files()
    processes = run_processes(tmp_path, "killed_peer", native_implementation, num_processes, devices_each)
    assert_ended(processes, [0] * (num_processes - 1) + [-signal.SIGKILL])
    assert shared_memory_files() <= before
