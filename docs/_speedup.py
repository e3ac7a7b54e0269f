"""Draws docs/img/speedup.svg, on top of the README, from docs/bench and the bench's table of other libraries.

python docs/_speedup.py
"""

import json
import pathlib
import re

from jax_ep.bench.peers import PEERS

DOCS = pathlib.Path(__file__).parent
PICTURE = DOCS / "img" / "speedup.svg"
WIDTH, LABEL, BAR, STEP = 760, 250, 400, 26
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 14px } .note { fill: #59636e; font-size: 11.5px }
  .paper { fill: #ffffff } .ours { fill: #1a7f37 } .other { fill: #8c959f }
  .floor { stroke: #cf222e; stroke-dasharray: 3 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note { fill: #9198a1 }
    .paper { fill: #0d1117 } .ours { fill: #3fb950 } .other { fill: #6e7681 }
  }
"""


def measured(file: str, row: str) -> tuple[float, float]:
    """The median of a row and its floor, in microseconds."""
    rows = json.loads((DOCS / "bench" / file).read_text())["rows"]
    (found,) = (r for r in rows if r["row"]["name"] == row)
    return found["row"]["times"]["median"] * 1e6, max(found["link_floor"], found["local_floor"]) * 1e6


def published(workload: str, name: str, column: str) -> float:
    """The best figure in our table of another library's."""
    (peer,) = (p for p in PEERS[workload] if p.name == name)
    text = getattr(peer, column) if column != "both" else re.search(r"both[^:]*: (\d+)", peer.note)[1]
    return float(text.split("-")[0])


def panels():
    """(title, our time and the floor, others' names and times) of each."""
    train, decode = "train-4k-4x-h200.json", "decode-4x-h200.json"
    te, nccl = "TransformerEngine JAX EP 2.20", "NCCL EP, expert-major"
    # The fastest stock pipeline that the bench found, see docs/performance.md.
    yield (
        "Training, 4096 tokens per GPU: dispatch to tokens grouped by expert",
        measured(train, "dispatch, fresh routing"),
        [
            ("DeepEP V2", published("train-4k", "DeepEP V2, expert-major", "dispatch")),
            ("NCCL EP", published("train-4k", nccl, "dispatch")),
            ("TransformerEngine JAX EP", published("train-4k", te, "dispatch")),
            ("fastest stock JAX", 1239.0),
        ],
    )
    yield (
        "Training: combine, weighted",
        measured(train, "combine, weighted"),
        [
            ("NCCL EP", published("train-4k", nccl, "combine")),
            ("fastest stock JAX", 966.0),
            ("TransformerEngine JAX EP", published("train-4k", te, "combine")),
        ],
    )
    # Of DeepEP V2 there are only times of the two apart.
    v2 = published("decode", "DeepEP V2, expert-major", "dispatch") + published(
        "decode", "DeepEP V2, a row per (token, rank)", "combine"
    )
    yield (
        "Decoding, 128 tokens per GPU: dispatch and combine",
        measured(decode, "forward"),
        [
            ("DeepEP V2, the two added", v2),
            ("NCCL EP, rank-major", published("decode", "NCCL EP, low latency, rank-major", "both")),
            ("DeepEP V1", published("decode", "DeepEP V1, low latency, bf16", "both")),
        ],
    )


def panel(title, ours, others, top: int) -> tuple[str, int]:
    """The SVG of one panel and where the next begins."""
    time, floor = ours
    bars = [("jax_ep", time), *others]
    scale = BAR / max(us for _, us in bars)
    lines = [f'<text class="title" x="16" y="{top + 14}">{title}</text>']
    for i, (name, us) in enumerate(bars):
        y = top + 24 + i * STEP
        kind, ratio = ("ours", "") if i == 0 else ("other", f"  {us / time:.1f}x")
        lines += [
            f'<text x="{LABEL - 10}" y="{y + 15}" text-anchor="end">{name}</text>',
            f'<rect class="{kind}" x="{LABEL}" y="{y + 2}" width="{us * scale:.1f}" height="18" rx="2"/>',
            f'<text x="{LABEL + us * scale + 8:.1f}" y="{y + 15}">{us:.0f} us{ratio}</text>',
        ]
    x, end = LABEL + floor * scale, top + 24 + len(bars) * STEP
    lines.append(f'<line class="floor" x1="{x:.1f}" y1="{top + 22}" x2="{x:.1f}" y2="{end}"/>')
    return "\n".join(lines), end + 18


def draw() -> str:
    """The picture."""
    top, parts = 14, []
    for title, ours, others in panels():
        part, top = panel(title, ours, others, top)
        parts.append(part)
    notes = (
        "4x H200, NVLink 4, CUDA 13.0; H=7168, 256 experts, top-8, bfloat16.",
        "Dashed: the floor, bytes over the link's measured rate; for decoding one flag round trip besides.",
        "Other libraries and stock JAX were measured on the same kind of machine in other runs: docs/performance.md.",
    )
    for note in notes:
        parts.append(f'<text class="note" x="16" y="{top + 6}">{note}</text>')
        top += 17
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 4}" role="img"'
    body = "\n".join(parts)
    paper = f'<rect class="paper" width="{WIDTH}" height="{top + 4}"/>'
    return f'{head} aria-label="Times beside other libraries">\n<style>{STYLE}</style>\n{paper}\n{body}\n</svg>\n'


if __name__ == "__main__":
    PICTURE.write_text(draw())
