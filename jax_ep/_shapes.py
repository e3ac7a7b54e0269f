"""Shape algebra of one communicator: pure functions of integers, tested without a device."""

from __future__ import annotations

import dataclasses

from jax_ep.types import DispatchLayout


def align_up(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


@dataclasses.dataclass(frozen=True)
class MoEShape:
    """The sizes that all ranks of a communicator agree on; see docs/design.md for the letters."""

    num_ranks: int  # R
    num_experts: int  # E
    topk: int  # K
    hidden_size: int  # H
    max_tokens_per_rank: int
    capacity: int  # C
    expert_alignment: int
    layout: DispatchLayout

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def rows_per_token(self) -> int:
        """Output rows that one token expands into on one rank at most."""
        return 1 if self.layout is DispatchLayout.RANK_MAJOR else self.topk

    @property
    def slots_per_expert(self) -> int:
        """S, for EXPERT_MAJOR."""
        return self.capacity // self.num_local_experts

    @property
    def num_row_groups(self) -> int:
        return self.num_ranks if self.layout is DispatchLayout.RANK_MAJOR else self.num_local_experts


def worst_case_capacity(
    *,
    num_ranks: int,
    num_local_experts: int,
    topk: int,
    max_tokens_per_rank: int,
    expert_alignment: int,
    layout: DispatchLayout,
) -> int:
    """Rows that a rank receives when every token of every rank is routed to it, and padding is at its worst.

    At least 1, so that no buffer is empty.
    """
    tokens = num_ranks * max_tokens_per_rank
    if layout is DispatchLayout.RANK_MAJOR:
        return max(1, tokens)
    if layout is DispatchLayout.EXPERT_MAJOR:
        return max(1, num_local_experts * tokens)
    rows = tokens * topk
    padding = min(num_local_experts, rows) * (expert_alignment - 1)
    return max(1, align_up(rows + padding, expert_alignment))
