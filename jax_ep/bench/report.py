"""Tables for the terminal, and the same numbers as JSON."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys

import jax

import jax_ep


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "devices": f"{jax.device_count()}x {device.device_kind}",
        "processes": str(jax.process_count()),
        "jax": jax.__version__,
        "jax_ep": jax_ep.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells):
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


class Progress:
    """A line on stderr that says what is being measured, where a person watches."""

    def __init__(self, total: int):
        self._total, self._done = total, 0

    def step(self, what: str) -> None:
        self._done += 1
        if sys.stderr.isatty():
            bar = ("#" * (20 * self._done // self._total)).ljust(20)
            print(f"\r[{bar}] {self._done}/{self._total} {what:40}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r" + " " * 80 + "\r", end="", file=sys.stderr)


def write_json(path: str, results: dict) -> None:
    with open(path, "w") as file:
        json.dump(results, file, indent=1, default=dataclasses.asdict)
