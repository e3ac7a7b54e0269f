"""What the doctor finds, as plain data: collected in one place, judged in another, shown in a third. Needs no JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of this process. What is not known is None."""

    id: int
    platform: str
    kind: str
    process: int
    compute_capability: str | None = None
    pool_bytes: int | None = None  # the most that JAX's pool takes


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as the driver sees it, whether JAX does or not."""

    name: str
    driver: str
    total_bytes: int


@dataclasses.dataclass(frozen=True)
class Extension:
    """Native code of jax_ep; without an error, it loads."""

    name: str
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices, versions and settings.

    `host` is equal in two processes only if they can reach each other's memory; `processes_apart` says what keeps even
    a process started by this one from doing so, None if nothing does.
    """

    versions: dict[str, str]
    devices: list[Device]
    num_processes: int
    process: int
    gpus: list[Gpu]
    extensions: list[Extension]
    environment: dict[str, str]
    host: str
    ptrace_scope: str | None
    processes_apart: str | None

    @property
    def platform(self) -> str:
        """Of the devices that JAX uses by default."""
        return self.devices[0].platform

    def extension_error(self, name: str) -> str | None:
        """What keeps the extension from loading."""
        return next(extension.error for extension in self.extensions if extension.name == name)


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """A tiny layer, forward and backward; without an error, it passed."""

    implementation: str
    mode: str
    num_ranks: int
    seconds: float
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Links:
    """What lies between every two devices: rows send, columns receive; None on the diagonal or where it failed."""

    transport: str
    method: str
    devices: list[int]
    bytes_per_s: list[list[float | None]]
    latency_s: list[list[float | None]]
    latency_is: str
    errors: dict[str, str]
    left_out: int = 0  # devices that were not measured


@dataclasses.dataclass(frozen=True)
class Arena:
    """The memory of a communicator outside JAX's pool, per GPU; without `bytes`, it is not known."""

    configuration: dict[str, int | str]
    implementation: str
    bytes: int | None
    meaning: str
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """`severity`: "error" where something is unusable, "warning", or "note"."""

    severity: str
    what: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """All of it; `links` and `arena` only where they were asked for."""

    machine: Machine
    self_tests: list[SelfTest]
    links: Links | None
    arena: Arena | None
    problems: list[Problem] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Warnings do not fail."""
        return all(problem.severity != "error" for problem in self.problems)
