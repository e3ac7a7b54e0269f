"""The sweeps as a picture: time over block counts, and over tokens per rank."""

from __future__ import annotations

import importlib.util

from jax_ep.bench.results import Ceilings, Point

MISSING = "--plot: needs matplotlib, which is not installed: pip install 'jax_ep[bench]'"


def is_available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_plot(path: str, points: list[Point], ceilings: Ceilings, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    labels = dict(blocks="blocks (num_sms)", tokens="tokens per rank")
    for panel, (axis, label) in zip(panels, labels.items(), strict=True):
        chosen = [point for point in points if point.axis == axis]
        panel.set(xlabel=label, ylabel="us per call")
        if not chosen:
            panel.text(0.5, 0.5, "GPUs only", ha="center", transform=panel.transAxes)
            continue
        for i, name in enumerate(dict.fromkeys(point.row.name for point in chosen)):
            _draw_op(panel, f"C{i}", name, [point for point in chosen if point.row.name == name], ceilings)
        panel.set_xscale("log", base=2)
        values = sorted({point.value for point in chosen})
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_op(panel, color: str, name: str, points: list[Point], ceilings: Ceilings) -> None:
    measured = [(p.value, p.row.times.median * 1e6) for p in points if p.row.times]
    floors = [(p.value, floor * 1e6) for p in points if (floor := ceilings.floor_s(p.row))]
    if measured:
        panel.plot(*zip(*measured, strict=True), color=color, marker="o", label=name)
    if floors:
        panel.plot(*zip(*floors, strict=True), color=color, linestyle="--", label=f"{name}: floor")
