"""What measurements say, as plain data: workers send it, the report reads it. Nothing here needs JAX."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

# Which op of stock JAX does the same as each of our rows.
STOCK_OPS = {
    "dispatch, fresh routing": "dispatch",
    "combine, weighted": "combine",
    "forward": "forward",
    "forward + backward": "forward + backward",
}


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call, a sample per repeat; `num_calls` calls were chained in one program."""

    samples: list[float]
    num_calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half of what the fastest and the slowest repeat lie apart, relative to the median."""
        return (max(self.samples) - min(self.samples)) / 2 / self.median

    @property
    def interquartile_range(self) -> float:
        """What the middle half of the repeats lies apart, relative to the median."""
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median


@dataclasses.dataclass(frozen=True)
class Row:
    """One op, or what kept it from being measured; and the bytes that the most loaded rank cannot avoid."""

    name: str
    times: Times | None
    error: str | None = None
    link_bytes: int = 0  # through the busier direction of its link
    local_bytes: int = 0  # read and written in its own memory
    flag_round_trips: int = 0  # that are part of the link's floor, in low-latency mode


@dataclasses.dataclass(frozen=True)
class Point:
    """A row of a sweep over "blocks" or "tokens"."""

    axis: str
    value: int
    row: Row


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine can do at best, per GPU; None where there is no such thing, or it failed."""

    copy_bytes_per_s: float | None  # read and written, by a plain copy
    store_bytes_per_s: float | None  # leaving a GPU while all store to all others
    flag_round_trip_s: float | None
    errors: dict[str, str]

    def link_floor_s(self, row: Row) -> float | None:
        bytes_s = _ratio(row.link_bytes, self.store_bytes_per_s)
        if bytes_s is None or row.flag_round_trips == 0:
            return bytes_s
        return None if self.flag_round_trip_s is None else bytes_s + row.flag_round_trips * self.flag_round_trip_s

    def local_floor_s(self, row: Row) -> float | None:
        return _ratio(row.local_bytes, self.copy_bytes_per_s)

    def floor_s(self, row: Row) -> float | None:
        """The larger of both."""
        known = [floor for floor in (self.link_floor_s(row), self.local_floor_s(row)) if floor]
        return max(known, default=None)


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One way to do an op in stock JAX, and how long it took."""

    op: str
    pipeline: str
    flags: dict[str, Any]
    times: Times | None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A program's time beside another's."""

    name: str
    times: Times | None
    error: str | None
    beside: str = ""
    beside_times: Times | None = None

    def against(self, beside: str, times: Times | None) -> Comparison:
        return dataclasses.replace(self, beside=beside, beside_times=times)


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product of rows in groups, beside the dense one of as many rows and one kernel: its ceiling."""

    name: str
    flops: int  # of one call
    times: Times | None
    error: str | None
    dense_times: Times | None = None

    @property
    def flop_per_s(self) -> float | None:
        return self.flops / self.times.median if self.times else None

    @property
    def times_dense(self) -> float | None:
        """How many times as long as the dense one it takes."""
        return self.times.median / self.dense_times.median if self.times and self.dense_times else None


@dataclasses.dataclass(frozen=True)
class StressResult:
    rounds: int
    wrong_sums: int  # rounds in which a token came back with another value
    wrong_rows: int  # rounds in which the received rows were not those sent
    rounds_per_s: float


def fastest(baselines: list[Baseline], op: str) -> Baseline | None:
    measured = [b for b in baselines if b.op == op and b.times is not None]
    return min(measured, key=lambda b: b.times.median if b.times else 0.0, default=None)


def restored(kind: type, data: dict[str, Any]):
    """A dataclass from what `dataclasses.asdict` made of it."""
    times = {name: Times(**value) for name, value in data.items() if name.endswith("times") and value}
    return kind(**(data | times))


def first_line(error: BaseException, limit: int = 200) -> str:
    """An exception as a cell of a table."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _ratio(amount: int, rate: float | None) -> float | None:
    return amount / rate if amount and rate else None
