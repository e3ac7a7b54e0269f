"""Named sizes and their random inputs, shared by benchmarks and tests."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """A mixture-of-experts layer's traffic. Sizes per rank; see docs/design.md for the letters."""

    name: str
    num_tokens: int  # T
    hidden_size: int  # H
    num_experts: int  # E
    topk: int  # K
    zipf_exponent: float = 0.0  # 0 is uniform routing
    capacity_factor: float = 1.25  # of balanced routing
    low_latency: bool = False  # the mode that it is measured in
    intermediate_size: int = 2048  # of each expert

    @property
    def rows_per_rank(self) -> int:
        """Of balanced routing."""
        return self.num_tokens * self.topk

    @property
    def capacity(self) -> int:
        """Rows per rank, a multiple of 128."""
        return -(-int(self.rows_per_rank * self.capacity_factor) // 128) * 128

    def routing(self, num_ranks: int, seed: int = 0) -> np.ndarray:
        """Distinct experts for every token: int32 `[R * T, K]`."""
        rng = np.random.default_rng(seed)
        popularity = np.arange(1, self.num_experts + 1, dtype=np.float64) ** -self.zipf_exponent
        # The experts with the K largest keys log(p) + Gumbel noise: a draw without replacement.
        keys = np.log(rng.permutation(popularity)) + rng.gumbel(size=(num_ranks * self.num_tokens, self.num_experts))
        return np.argpartition(-keys, self.topk - 1, axis=1)[:, : self.topk].astype(np.int32)

    def weights(self, num_ranks: int, seed: int = 1) -> np.ndarray:
        """float32 `[R * T, K]`, adding up to 1 for each token."""
        weights = np.random.default_rng(seed).random((num_ranks * self.num_tokens, self.topk), np.float32) + 0.1
        return weights / weights.sum(1, keepdims=True)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("train-4k", 4096, 7168, 256, 8),
        Workload("train-4k-skewed", 4096, 7168, 256, 8, zipf_exponent=1.0),
        Workload("small", 8192, 2048, 64, 8, intermediate_size=1024),
        Workload("decode", 128, 7168, 256, 8, low_latency=True),
        Workload("cpu-2k", 2048, 1024, 64, 8, intermediate_size=256),
        Workload("tiny", 64, 64, 16, 2, intermediate_size=32),
        Workload("tiny-decode", 16, 64, 16, 2, low_latency=True, intermediate_size=32),
    )
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a routing makes ranks move at least, in rows of H elements; the most loaded rank's, or pair's, numbers."""

    rows_over_link: int  # (token, rank) that leave, or arrive at, one rank
    rows_received: int  # output rows that hold a token
    tokens_received: int  # (token, rank) that one rank receives, its own included
    rows_per_pair: int  # (token, k) from one rank to one rank
    tokens_per_pair: int  # (token, rank) from one rank to one rank

    @staticmethod
    def of(workload: Workload, routing: np.ndarray, num_ranks: int) -> Traffic:
        ranks = routing // (workload.num_experts // num_ranks)
        # [source, token, k, destination] and [source, destination]
        goes_to = (ranks[..., None] == np.arange(num_ranks)).reshape(num_ranks, -1, workload.topk, num_ranks)
        rows, tokens = goes_to.sum((1, 2)), goes_to.any(2).sum(1)
        crossing = tokens * (1 - np.eye(num_ranks, dtype=int))
        return Traffic(
            rows_over_link=int(max(crossing.sum(0).max(), crossing.sum(1).max())),
            rows_received=int(rows.sum(0).max()),
            tokens_received=int(tokens.sum(0).max()),
            rows_per_pair=int(rows.max()),
            tokens_per_pair=int(tokens.max()),
        )
