"""What other libraries take for the same job. Never measured by this benchmark: each line says where it comes from.

docs/performance.md has the same tables, and says what is known about them.
"""

from __future__ import annotations

import dataclasses

_HOST = "4x H200 (NVLink 4), driver 580, CUDA 13.0"
_MEASURED = "measured by the authors of jax_ep, 2026-11-21"


@dataclasses.dataclass(frozen=True)
class Peer:
    """Microseconds as text, since some are ranges."""

    name: str
    dispatch: str
    combine: str
    note: str = ""
    hardware: str = _HOST
    source: str = _MEASURED


TRAIN_4K = "T=4096 per rank, H=7168, E=256, K=8, bfloat16"
DECODE = "T=128 per rank, H=7168, E=256, K=8, bfloat16"

PEERS: dict[str, list[Peer]] = {
    "train-4k": [
        Peer("TransformerEngine JAX EP 2.20", "982-1105", "1338-1370", "expert-major, pipelined calls"),
        Peer("NCCL EP, expert-major", "796", "706", "C bench, host time; kernels alone 544 + 189, 183 + 508"),
        Peer("NCCL EP, a row per (token, rank)", "685-735", "620-668", "zero-copy 572, 512"),
        Peer("DeepEP V2, expert-major", "735-743", "-"),
        Peer("DeepEP V2, a row per (token, rank)", "664-690", "592-634"),
        Peer("DeepEP V1, 24 SMs, a row per (token, rank)", "829", "595", "worst-case output, no host sync"),
        Peer("DeepEP V1, 64 SMs, a row per (token, rank)", "587", "542", "worst-case output, no host sync"),
        Peer("DeepEP V1, 128 SMs, a row per (token, rank)", "519", "512", "worst-case output, no host sync"),
        Peer("DeepEP V2, 24 SMs, fp8 dispatch", "352", "-", "half the bytes"),
        Peer("DeepEP V1, 64 SMs, fp8 dispatch", "292", "-", "half the bytes"),
        Peer("MSCCL++ EP, 16 SMs", "454", "474", "twice the link", "4x GB200 (NVLink 5)", "published"),
        Peer("MSCCL++ EP, 32 SMs", "287", "269", "twice the link", "4x GB200 (NVLink 5)", "published"),
        Peer("stock lax.ragged_all_to_all", "45400", "-", "jax 0.11.2, defaults; 8 copies per token"),
        Peer("stock lax.all_to_all", "1254", "-", "payload alone"),
    ],
    "decode": [
        Peer("DeepEP V2, a row per (token, rank)", "37", "37"),
        Peer("DeepEP V2, expert-major", "40", "-"),
        Peer("DeepEP V1, low latency, bf16", "59", "62", "both in a CUDA graph: 116"),
        Peer("DeepEP V1, low latency, fp8 dispatch", "41", "-", "both in a CUDA graph: 98"),
        Peer("NCCL EP, low latency, expert-major", "48", "71", "both: 126"),
        Peer("NCCL EP, low latency, rank-major", "53", "45", "both: 105"),
    ],
}

# A skewed routing is another job.
SIZES = {"train-4k": TRAIN_4K, "decode": DECODE}
