"""How evenly a routing loads experts and ranks."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._checks import expect
from jax_ep.types import Array, DispatchHandle, DispatchLayout, DispatchOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankLoad:
    """What one rank received.

    Attributes:
      tokens_per_local_expert: int32 `[L]`, the (token, k) that each of its experts received.
      rows: int32 `[]`, the rows of its dispatch output that hold a token.
      dropped: int32 `[]`, the rows that found no place within its capacity.
    """

    tokens_per_local_expert: Array
    rows: Array
    dropped: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoadStatistics:
    """What all ranks of a dispatch received; the same on each of them, so `shard_map` returns it with `P()`.

    Attributes:
      tokens_per_expert: int32 `[E]`, the (token, k) that each expert received, without those that were dropped.
      rows_per_rank: int32 `[R]`, the rows of each rank's dispatch output that hold a token.
      dropped_per_rank: int32 `[R]`, the rows that found no place within each rank's capacity.
      expert_imbalance: float32 `[]`, the most loaded expert's tokens over the mean: 1 is even, E is all to one
        expert. 1 if there are none.
      rank_imbalance: float32 `[]`, the same of `rows_per_rank`: the most loaded rank is who the others wait for.
    """

    tokens_per_expert: Array
    rows_per_rank: Array
    dropped_per_rank: Array
    expert_imbalance: Array
    rank_imbalance: Array

    def of_rank(self, rank) -> RankLoad:
        """One rank's part; inside `shard_map`, `of_rank(jax.lax.axis_index("ep"))` is one's own."""
        by_rank = self.tokens_per_expert.reshape(self.rows_per_rank.shape[0], -1)
        return RankLoad(by_rank[rank], self.rows_per_rank[rank], self.dropped_per_rank[rank])


def load_statistics(received: DispatchOutput | DispatchHandle) -> LoadStatistics:
    """Counts what all ranks received. Call inside `jax.shard_map`; costs one small `psum`.

    Args:
      received: what `MoECommunicator.dispatch` returned, either of the two.

    Returns:
      The statistics of this group of ranks. If the step is NaN for an overflow, they count the rows that found a place.

    Raises:
      TypeError: `received` is neither.
      ValueError: the call is not inside `jax.shard_map` over the communicator's axis.
    """
    if not isinstance(received, DispatchOutput | DispatchHandle):
        raise TypeError(f"received: expected a DispatchOutput or a DispatchHandle, got {type(received).__name__}")
    layout, axes = received.layout, jax.sharding.get_abstract_mesh().manual_axes
    axis_name = layout.axis_name
    expect(axis_name in axes, "load_statistics", f"a call inside jax.shard_map over mesh axis {axis_name!r}", axes)
    tokens = layout.num_tokens_per_expert
    # Groups of RANK_MAJOR are never padded, those of FLAT may be.
    rows = layout.offsets[-1] if layout.kind is DispatchLayout.RANK_MAJOR else tokens.sum(dtype=jnp.int32)
    mine = jnp.concatenate([tokens, rows[None], received.num_dropped[None]])
    ranks = jnp.arange(jax.lax.axis_size(axis_name), dtype=jnp.int32)[:, None]
    # As a sum, since JAX types what all_gather returns as different on each rank.
    everyones = jax.lax.psum(jnp.where(ranks == jax.lax.axis_index(axis_name), mine, 0), axis_name)  # [R, L + 2]
    tokens_per_expert, rows_per_rank, dropped = everyones[:, :-2].reshape(-1), everyones[:, -2], everyones[:, -1]
    return LoadStatistics(
        tokens_per_expert, rows_per_rank, dropped, _imbalance(tokens_per_expert), _imbalance(rows_per_rank)
    )


def _imbalance(counts: Array) -> Array:
    """The largest over the mean."""
    total = jnp.maximum(counts.sum(dtype=jnp.int32), 1).astype(jnp.float32)
    return jnp.where((counts > 0).any(), counts.max().astype(jnp.float32) * counts.size / total, 1.0)


def plot_load(stats: LoadStatistics, path: str | os.PathLike) -> None:
    """Draws bars per expert and per rank, each with its mean.

    Args:
      stats: of one group of ranks, as returned from the compiled program.
      path: the picture's file; its ending chooses the format.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_load: needs matplotlib, which is not installed: pip install matplotlib") from error
    experts, rows, dropped = map(np.asarray, (stats.tokens_per_expert, stats.rows_per_rank, stats.dropped_per_rank))
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_expert, by_rank = figure.subplots(1, 2)
    by_expert.bar(np.arange(experts.size), experts, width=0.9)
    by_expert.set(xlabel="expert", ylabel="tokens", title=f"largest / mean {float(stats.expert_imbalance):.2f}")
    by_rank.bar(np.arange(rows.size), rows, width=0.9, label="received")
    if dropped.any():
        by_rank.bar(np.arange(rows.size), dropped, width=0.9, bottom=rows, color="C3", label="dropped")
    by_rank.set(xlabel="rank", ylabel="rows", title=f"largest / mean {float(stats.rank_imbalance):.2f}")
    by_rank.set_xticks(np.arange(rows.size))
    for panel, counts in ((by_expert, experts), (by_rank, rows)):
        panel.axhline(counts.mean(), color="black", linestyle="--", linewidth=1, label=f"mean {counts.mean():.1f}")
        panel.legend()
    figure.savefig(path, dpi=150)
