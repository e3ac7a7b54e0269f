"""Tables for the terminal, a line of progress, and the same numbers as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import Any

from jax_ep.bench import peers
from jax_ep.bench.results import STOCK_OPS, Baseline, Ceilings, Comparison, Product, Row, StressResult, Times, fastest

_LEGEND = """\
us: median per call, calls chained in one program with nothing between them; spread: half the repeats' range over it.
link floor: payload of the busier direction of the most loaded rank's link, at the rate of plain stores to all peers;
in low-latency mode, and one flag round trip besides.
local floor: rows that rank must read and write in its own memory, at the rate of a plain copy. x floor: to the larger.
stock: the fastest of several pipelines of stock JAX collectives that do the same job, over several XLA flags."""

_PRODUCTS_LEGEND = """\
us: median per call, calls chained in one program with nothing between them; spread: half the repeats' range over it.
dense: one kernel for as many rows, in this run. TFLOP/s: of the rows that belong to a group. Rows and groups' sizes are
the same for all; backward: gradients in rows and kernels. Results are checked against a loop over groups in float32."""


def us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def outcome(name: str, measured: Row | Comparison | Baseline | Product) -> str:
    return f"{name}: {us(measured.times.median) + ' us' if measured.times else f'failed: {measured.error}'}"


def times_cells(times: Times | None) -> list[str]:
    return ["-", "-"] if times is None else [us(times.median), f"{times.spread:.1%}"]


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else "-"


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


def print_environment(environment: dict[str, str]) -> None:
    print("  ".join(f"{name} {value}" for name, value in environment.items() if value))


def print_problem(problem: dict[str, Any], ceilings: Ceilings) -> None:
    workload, traffic = problem["workload"], problem["traffic"]
    print(
        f"{workload['name']}: T={workload['num_tokens']} H={workload['hidden_size']} E={workload['num_experts']} "
        f"K={workload['topk']} bfloat16, {'low latency' if workload['low_latency'] else 'high throughput'}, output "
        f"{list(problem['output_shape'])} per rank. The most loaded rank receives "
        f"{traffic['rows_received']} rows; {traffic['rows_over_link']} (token, rank) rows cross its link. "
        f"Arena {problem['arena_bytes'] / 2**20:.0f} MiB."
    )
    known = []
    if ceilings.store_bytes_per_s:
        known.append(f"stores to all peers {ceilings.store_bytes_per_s / 1e9:.0f} GB/s per GPU")
    if ceilings.flag_round_trip_s:
        known.append(f"flag round trip {ceilings.flag_round_trip_s * 1e6:.2f} us")
    if ceilings.copy_bytes_per_s:
        known.append(f"copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s read and written per device")
    known += [f"{name} failed: {error}" for name, error in ceilings.errors.items()]
    print(f"Ceilings: {'; '.join(known)}.\n")


def summary(row: Row, ceilings: Ceilings, baselines: list[Baseline]) -> dict[str, Any]:
    """A row with what follows from other measurements."""
    return dict(
        row=row,
        link_floor=ceilings.link_floor_s(row),
        local_floor=ceilings.local_floor_s(row),
        best_stock=fastest(baselines, STOCK_OPS.get(row.name, "")),
    )


def print_rows(rows: list[Row], ceilings: Ceilings, baselines: list[Baseline]) -> None:
    header = ["op", "us", "spread", "link floor us", "local floor us", "x floor", "best stock us", "times faster"]
    lines = []
    for row in rows:
        stock = fastest(baselines, STOCK_OPS.get(row.name, ""))
        stock_s = stock.times.median if stock and stock.times else None
        median = row.times.median if row.times else None
        lines.append(
            [row.name, *times_cells(row.times), us(ceilings.link_floor_s(row)), us(ceilings.local_floor_s(row))]
            + [ratio(median, ceilings.floor_s(row)), us(stock_s), ratio(stock_s, median)]
        )
    print(format_table(header, lines))
    _print_failures((row.name, row.error) for row in rows)
    print(f"\n{_LEGEND}")


def print_comparisons(comparisons: list[Comparison]) -> None:
    lines = []
    for c in comparisons:
        median = c.times.median if c.times else None
        beside = c.beside_times.median if c.beside_times else None
        lines.append([c.name, *times_cells(c.times), c.beside or "-", us(beside), ratio(median, beside)])
    print("\n" + format_table(["program", "us", "spread", "against", "us", "ratio"], lines))
    _print_failures((c.name, c.error) for c in comparisons)


def print_baselines(baselines: list[Baseline]) -> None:
    lines = []
    for b in baselines:
        flags = " ".join(f"{name}={value!r}" for name, value in b.flags.items()) or "default"
        lines.append([f"{b.op}: {b.pipeline}", *times_cells(b.times), f"failed: {b.error}" if b.error else "", flags])
    print("\n" + format_table(["stock JAX", "us", "spread", "", "XLA flags"], lines))


def print_stress(result: StressResult) -> None:
    print(
        f"{result.rounds} rounds of dispatch and combine, {result.rounds_per_s:.1f} per second: {result.wrong_sums} "
        f"with wrong sums, {result.wrong_rows} with wrong rows."
    )


def print_transfer(rows: list[Row], ceilings: Ceilings) -> None:
    """Experts that moved; rates are of the bytes that leave each rank."""
    stores = ceilings.store_bytes_per_s
    print(f"\nStores to all peers: {f'{stores / 1e9:.0f} GB/s' if stores else 'not measured'}, leaving each rank.\n")
    lines = []
    for row in rows:
        rate = row.link_bytes / row.times.median if row.times else None
        rates = [f"{rate / 1e9:.2f}" if rate else "-", ratio(rate, stores)]
        lines.append([row.name, *times_cells(row.times), f"{row.link_bytes / 1e9:.3f}", *rates])
    print(format_table(["transfer", "us", "spread", "GB from a rank", "GB/s", "of stores"], lines))
    for row in rows:
        if row.error:
            print(f"{row.name} failed: {row.error}")


def print_products(experts: dict[str, Any], products: list[Product]) -> None:
    num_groups, hidden, inner = experts["kernels_shape"]
    groups = "; ".join(f"{name}, of {min(sizes)} to {max(sizes)}" for name, sizes in experts["group_sizes"].items())
    print(
        f"{experts['workload']}: {experts['num_rows']} rows of {hidden}, in an array of {experts['array_rows']}, times "
        f"{num_groups} kernels of {hidden} x {inner}, {experts['dtype']}, on one device. Groups: {groups}."
    )
    tokamax = experts["tokamax"]
    print(f"tokamax {tokamax}.\n" if tokamax else "Without tokamax: pip install 'jax_ep[nn,tokamax]'.\n")
    lines = []
    for product in products:
        rate, slower = product.flop_per_s, product.times_dense
        numbers = [f"{rate / 1e12:.3g}" if rate else "-", f"{slower:.2f}" if slower else "-"]
        lines.append([product.name, *times_cells(product.times), *numbers])
    print(format_table(["matrix product", "us", "spread", "TFLOP/s", "x dense"], lines))
    _print_failures((product.name, product.error) for product in products)
    print(f"\n{_PRODUCTS_LEGEND}")


def product_summary(product: Product) -> dict[str, Any]:
    return dict(product=product, flop_per_s=product.flop_per_s, times_dense=product.times_dense)


def peers_of(problem: dict[str, Any]) -> list[peers.Peer]:
    return peers.PEERS.get(problem["workload"]["name"], []) if problem else []


def print_peers(workload: str) -> None:
    if workload not in peers.PEERS:
        return
    print(f"\nOther libraries, not measured in this run: {peers.SIZES[workload]}")
    header = ["library", "dispatch us", "combine us", "note", "hardware", "source"]
    print(format_table(header, [[p.name, p.dispatch, p.combine, p.note, p.hardware, p.source] for p in
                                peers.PEERS[workload]]))  # fmt: skip


def _print_failures(named: Iterable[tuple[str, str | None]]) -> None:
    for name, error in named:
        if error:
            print(f"{name}: failed: {error}")


class Progress:
    """Says on stderr what was measured last: in one line where a person watches, in many where a log is kept."""

    def __init__(self) -> None:
        self._total = self._done = 0

    def expect(self, more: int) -> None:
        self._total += more

    def step(self, what: str) -> None:
        self._done += 1
        self._total = max(self._total, self._done)
        if sys.stderr.isatty():
            bar = ("#" * (20 * self._done // self._total)).ljust(20)
            print(f"\r[{bar}] {self._done}/{self._total} {what:70.70}", end="", file=sys.stderr, flush=True)
        else:
            print(f"[{self._done}/{self._total}] {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r" + " " * 110 + "\r", end="", file=sys.stderr)


def write_json(path: str, results: dict) -> None:
    def plain(value):
        """Times also say what follows from their samples."""
        if isinstance(value, Times):
            summary = dict(median=value.median, spread=value.spread, interquartile_range=value.interquartile_range)
            return dict(samples=value.samples, num_calls=value.num_calls) | summary
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

    with open(path, "w") as file:
        json.dump(results, file, indent=1, default=plain)
