"""Findings as text, as a picture and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import json

from jax_ep.bench.report import format_table
from jax_ep.doctor.findings import Arena, Findings, Links, Machine, SelfTest


def render(findings: Findings) -> str:
    """What is printed, the verdict last."""
    parts = [_machine(findings.machine), _self_tests(findings.self_tests)]
    if findings.links is not None:
        parts.append(_links(findings.links))
    if findings.arena is not None:
        parts.append(_arena(findings.arena))
    parts.append(_verdict(findings))
    return "\n\n".join(parts)


def _machine(machine: Machine) -> str:
    kinds = collections.Counter((device.kind, device.compute_capability) for device in machine.devices)
    lines = []
    for (kind, capability), count in kinds.items():
        lines.append(f"{count}x {kind}" + (f", compute capability {capability}" if capability else ""))
    devices = "; ".join(lines)
    extensions = ", ".join(f"{e.name} {'does not load' if e.error else 'loads'}" for e in machine.extensions)
    rows = [
        ["devices of this process", devices],
        ["process", f"{machine.process} of {machine.num_processes}"],
        *([name, value] for name, value in machine.versions.items()),
        ["extensions", extensions],
        *([f"{e.name} extension", e.error] for e in machine.extensions if e.error),
        *([name, value] for name, value in machine.environment.items()),
        # Equal in two processes only if they can share memory: to be compared between containers.
        ["host and pid namespace", machine.host],
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _self_tests(self_tests: list[SelfTest]) -> str:
    header = ["self-test: forward and backward", "ranks", "seconds", "result"]
    rows = [
        [f"{t.implementation}, {t.mode}", str(t.num_ranks), f"{t.seconds:.1f}", "FAILED" if t.error else "passed"]
        for t in self_tests
    ]
    return format_table(header, rows)


def _links(links: Links) -> str:
    tables = [
        _matrix("GB/s, from \\ to", links, links.bytes_per_s, 1e-9),
        _matrix("us, from \\ to", links, links.latency_s, 1e6),
    ]
    text = f"Transport: {links.transport}.\nBandwidth: {links.method}.\n\n{tables[0]}"
    text += f"\n\nLatency: {links.latency_is}.\n\n{tables[1]}"
    return text + (f"\n{links.left_out} further devices were not measured." if links.left_out else "")


def _matrix(title: str, links: Links, values: list[list[float | None]], factor: float) -> str:
    cells = [["-" if value is None else f"{value * factor:.1f}" for value in row] for row in values]
    rows = [[str(device), *row] for device, row in zip(links.devices, cells, strict=True)]
    return format_table([title, *map(str, links.devices)], rows)


def _arena(arena: Arena) -> str:
    configuration = " ".join(f"{name}={value}" for name, value in arena.configuration.items())
    size = "not known" if arena.bytes is None else f"{arena.bytes / 2**20:.1f} MiB ({arena.bytes} bytes)"
    return f"arena_bytes, implementation {arena.implementation!r}, {configuration}: {size}.\n{arena.meaning}."


def _verdict(findings: Findings) -> str:
    lines = []
    for problem in findings.problems:
        lines.append(f"{problem.severity}: {problem.what}\n  -> {problem.remedy}")
    counts = collections.Counter(problem.severity for problem in findings.problems)
    found = ", ".join(
        f"{counts[s]} {s}{'s' if counts[s] > 1 else ''}" for s in ("error", "warning", "note") if counts[s]
    )
    verdict = "jax_ep works here" if findings.ok else "jax_ep does not work here as it should"
    return "\n".join([*lines, f"{verdict}: {found or 'nothing to remark'}."])


def write_json(path: str, findings: Findings) -> None:
    """All of it, beside the verdict."""
    with open(path, "w") as file:
        json.dump(dict(ok=findings.ok) | dataclasses.asdict(findings), file, indent=1)


def write_plot(path: str, links: Links) -> None:
    """Heat maps of bandwidth and latency. Needs matplotlib."""
    import numpy as np
    from matplotlib.figure import Figure

    size = max(4.0, 0.55 * len(links.devices) + 2)
    figure = Figure(figsize=(2 * size + 1, size), layout="constrained")
    panels = zip(
        figure.subplots(1, 2),
        (("bandwidth, GB/s", links.bytes_per_s, 1e9), ("latency, us", links.latency_s, 1e-6)),
        strict=True,
    )
    for panel, (title, values, unit) in panels:
        matrix = np.array(values, float) / unit
        image = panel.imshow(np.ma.masked_invalid(matrix), cmap="Blues", vmin=0)
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                color = "white" if image.norm(value) > 0.6 else "black"
                panel.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7, color=color)
        ticks = range(len(links.devices))
        panel.set(title=title, xlabel="to device", ylabel="from device")
        panel.set_xticks(ticks, links.devices)
        panel.set_yticks(ticks, links.devices)
        figure.colorbar(image, ax=panel, shrink=0.8)
    figure.suptitle(links.transport, fontsize=10)
    figure.savefig(path, dpi=150)
