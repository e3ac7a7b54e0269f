"""Runs stages of the benchmark in processes of their own and hears from them.

The process that a user starts never touches the devices: it can report a stage that a baseline took down, or that
hangs, and go on. A stage is one process, or one per GPU; the first of them reports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

_WORKER = [sys.executable, "-m", "jax_ep.bench.worker"]
# How long the other processes of a stage may go on once one has failed.
_GRACE_S = 15.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a worker is told."""

    name: str
    workload: str
    devices: int | None = None
    num_processes: int = 1
    only: str | None = None
    blocks: int | None = None
    comparisons: bool | None = None  # None: on GPUs
    sweeps: bool = False
    sweep_flags: bool = True
    stress_rounds: int = 0
    transfer_gb: float = 0.0  # 0: what suits the devices
    local_experts: int = 0  # 0: the workload's over all devices
    known: dict[str, Any] = dataclasses.field(default_factory=dict)  # baselines, by configuration
    process: int = 0
    port: int = 0
    events: int | None = None  # the file descriptor that the first process writes to
    parent: int = 0


class StageFailed(RuntimeError):
    """A stage ended before it was done, or was ended."""


def run_stage(stage: Stage, *, timeout_s: float, silence_s: float | None = None) -> Iterator[tuple[str, dict]]:
    """Yields the events of a stage as they come.

    Raises:
      StageFailed: a process failed, the stage took longer than `timeout_s`, or said nothing for `silence_s`.
    """
    reading, writing = os.pipe()
    stage = dataclasses.replace(stage, port=_free_port(), parent=os.getpid())
    with tempfile.TemporaryFile("w+") as log:
        workers = []
        try:
            for process in range(stage.num_processes):
                workers.append(_start(dataclasses.replace(stage, process=process), writing, log))
            os.close(writing)
            writing = -1
            yield from _events(reading, workers, time.monotonic() + timeout_s, silence_s or timeout_s)
            _wait(workers)
        except StageFailed as failure:
            _end(workers)
            raise StageFailed(f"{failure}\n{_tail(log)}".strip()) from None
        finally:
            _end(workers)
            for descriptor in (reading, writing):
                if descriptor >= 0:
                    os.close(descriptor)


def _start(stage: Stage, events: int, log) -> subprocess.Popen:
    reports = stage.process == 0
    stage = dataclasses.replace(stage, events=events if reports else None)
    return subprocess.Popen(
        [*_WORKER, json.dumps(dataclasses.asdict(stage))],
        # Warnings are there what they are here.
        env=os.environ | dict(PYTHONWARNINGS=",".join(sys.warnoptions)),
        pass_fds=(events,) if reports else (),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )


def _events(reading: int, workers, deadline: float, silence_s: float) -> Iterator[tuple[str, dict]]:
    """Until the pipe is closed, which it is when the first process ends."""
    buffer, heard = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.2):
                data = os.read(reading, 1 << 16)
                if not data:
                    return
                heard = time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    kind, content = json.loads(line)
                    yield kind, content
            now = time.monotonic()
            if any(worker.poll() for worker in workers):
                deadline = min(deadline, now + _GRACE_S)
            if now > min(deadline, heard + silence_s):
                raise StageFailed(_why(workers) or f"nothing heard for {now - heard:.0f} s")


def _wait(workers) -> None:
    deadline = time.monotonic() + _GRACE_S
    while any(worker.poll() is None for worker in workers):
        if time.monotonic() > deadline:
            raise StageFailed(_why(workers) or "a process did not end")
        time.sleep(0.02)
    if why := _why(workers):
        raise StageFailed(why)


def _why(workers) -> str:
    failed = [f"process {i} ended with status {w.poll()}" for i, w in enumerate(workers) if w.poll()]
    return ", ".join(failed)


def _end(workers) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            # One that a driver holds on to ends when it can.
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(timeout=_GRACE_S)


def _tail(log, num_lines: int = 25) -> str:
    log.seek(0)
    return "\n".join(log.read().splitlines()[-num_lines:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_resiliently(
    stage: Stage, on_event: Callable[[str, dict], None], *, timeout_s: float, silence_s: float, max_restarts: int = 16
) -> None:
    """Runs a stage of baselines; one that takes it down, or hangs, becomes a known failure, and the rest goes on."""
    deadline = time.monotonic() + timeout_s
    known: dict[str, Any] = {}
    for _ in range(max_restarts):
        doing: dict[str, Any] | None = None

        try:
            for kind, content in run_stage(
                dataclasses.replace(stage, known=known), timeout_s=deadline - time.monotonic(), silence_s=silence_s
            ):
                if kind == "configuration":
                    doing = content
                elif kind == "baseline":
                    known[content["key"]] = content["baseline"]
                    doing = None
                on_event(kind, content)
            return
        except StageFailed as failure:
            if doing is None or time.monotonic() > deadline:
                raise
            failed = doing["if_failed"] | dict(error=str(failure).splitlines()[0])
            known[doing["key"]] = failed
            on_event("baseline", dict(key=doing["key"], baseline=failed))
    raise StageFailed(f"restarted {max_restarts} times")
