"""What dispatch and combine take and give: layouts, outputs, the handle, and the errors."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax

Array = jax.Array


class MoEMode(enum.Enum):
    """What the communication is tuned for."""

    HIGH_THROUGHPUT = "high_throughput"
    """Training and prefill: thousands of tokens per rank, limited by the link's bandwidth."""


class DispatchLayout(enum.Enum):
    """How the rows of a dispatch output are arranged."""

    FLAT = "flat"
    """`[C, H]`: a row per (token, k), grouped by local expert, then by (source rank, token, k)."""

    RANK_MAJOR = "rank_major"
    """`[C, H]`: a row per (token, rank), grouped by source rank, then by token. Nothing is expanded."""


class ErrorCode(enum.IntEnum):
    """What an op reports; values as in ffi/common/layout.h."""

    NONE = 0
    OVERFLOW = 1
    BAD_EXPERT_ID = 2
    TIMEOUT = 3


class CapacityError(RuntimeError):
    """A rank was sent more rows than `max_recv_tokens_per_rank`."""


class ExpertIdError(RuntimeError):
    """`topk_ids` held an id that is neither -1 nor an expert."""


class PeerTimeoutError(RuntimeError):
    """A peer did not take part in an op within `timeout_s`. The communicator is beyond use."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchLayoutInfo:
    """Where the rows of a dispatch output are.

    Attributes:
      kind: the layout.
      num_tokens_per_expert: int32 `[L]`, the (token, k) that each local expert received.
      offsets: int32, the first row of each group; the last entry is the end of all rows. `[L + 1]`, a group
        per local expert, for `FLAT`; `[R + 1]`, a group per source rank, for `RANK_MAJOR`.
    """

    kind: DispatchLayout = dataclasses.field(metadata={"static": True})
    num_tokens_per_expert: Array
    offsets: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchOutput:
    """What a rank received.

    Attributes:
      tokens: `[C, H]` in the dtype of `x`. Rows that hold no token are zero.
      layout: where the rows are.
      num_dropped: int32 `[]`, rows of this rank that found no place within the capacity.
      topk_ids: for `RANK_MAJOR`, int32 `[C, K]`: the local expert ids of each row, -1 where the k-th expert
        lives elsewhere. Otherwise None.
      topk_weights: for `RANK_MAJOR`, float32 `[C, K]`: the weights beside `topk_ids`, 0 where that is -1; None
        if dispatch was given none. The expert side applies them, since a row stands for several experts.
    """

    tokens: Array
    layout: DispatchLayoutInfo
    num_dropped: Array
    topk_ids: Array | None = None
    topk_weights: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchHandle:
    """What combine, and later dispatches of the same routing, need to know. A pytree: pass it through jit,
    scan and remat like any other.

    Attributes:
      routing: the implementation's tables.
      row_weights: float32, the routing weights beside the rows: `[C]` for `FLAT`, which combine applies; `[C, K]` for
        `RANK_MAJOR`, which the expert side does. None if dispatch was given none.
      layout: as in `DispatchOutput`.
      num_dropped: as in `DispatchOutput`.
      topk_ids: as in `DispatchOutput`.
      num_tokens: T, the tokens per rank that were dispatched.
      communicator_id: which communicator made it.
    """

    routing: Any
    row_weights: Array | None
    layout: DispatchLayoutInfo
    num_dropped: Array
    topk_ids: Array | None
    num_tokens: int = dataclasses.field(metadata={"static": True})
    communicator_id: int = dataclasses.field(metadata={"static": True})
