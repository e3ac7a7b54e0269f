"""What dispatch and combine take and give: layouts, outputs, the handle, and the errors."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


class MoEMode(enum.Enum):
    """What the communication is tuned for."""

    HIGH_THROUGHPUT = "high_throughput"
    """Training and prefill: thousands of tokens per rank, limited by the link's bandwidth."""

    LOW_LATENCY = "low_latency"
    """Decoding: up to hundreds of tokens per rank, where every microsecond counts. An op is one kernel."""


class DispatchLayout(enum.Enum):
    """How the rows of a dispatch output are arranged."""

    FLAT = "flat"
    """`[C, H]`: a row per (token, k), grouped by local expert, then by (source rank, token, k)."""

    RANK_MAJOR = "rank_major"
    """`[C, H]`: a row per (token, rank), grouped by source rank, then by token. Nothing is expanded."""

    EXPERT_MAJOR = "expert_major"
    """`[L, S, H]`: a row per (token, k), S slots for each local expert, in the order of FLAT; in mode LOW_LATENCY. S is
    the ranks times `max_tokens_per_rank`. The first `num_tokens_per_expert[i]` slots of expert i hold its rows. The
    others are zero where `x` or `weights` is differentiated, and otherwise hold anything at all, NaN included: writing
    them would take many times as long as the op."""


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
        per local expert, for `FLAT` and, S slots each, `EXPERT_MAJOR`; `[R + 1]`, a group per source rank, for
        `RANK_MAJOR`.
      axis_name: the communicator's mesh axis.
    """

    kind: DispatchLayout = dataclasses.field(metadata={"static": True})
    num_tokens_per_expert: Array
    offsets: Array
    axis_name: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How `dispatch` sends quantised rows. See jax_ep/_quant.py for the exact definition.

    Hashable without `scales`, and a pytree of them.

    Attributes:
      dtype: of the elements: float8_e4m3fn, float8_e5m2 or int8.
      block_size: neighbouring elements that share a scale; divides the hidden size.
      scale_dtype: float32, or float8_e8m0fnu: powers of two, as in MXFP8 with blocks of 32.
      scales: `[T, H / block_size]` for an `x` that is quantised already, which is then sent as it is. Without them
        `x` is in the communicator's dtype, and quantised on its way.
    """

    dtype: Any = dataclasses.field(default=jnp.float8_e4m3fn, metadata={"static": True})
    block_size: int = dataclasses.field(default=128, metadata={"static": True})
    scale_dtype: Any = dataclasses.field(default=jnp.float32, metadata={"static": True})
    scales: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantOutput:
    """What belongs to quantised rows.

    Attributes:
      scales: `[C, H / block_size]`, or `[L, S, H / block_size]`, beside `DispatchOutput.tokens`.
      straight_through: what the gradient of `jax_ep.dequantize` flows into, of no use besides; None if `x` came
        quantised.
    """

    scales: Array
    straight_through: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchOutput:
    """What a rank received.

    Attributes:
      tokens: `[C, H]`, or `[L, S, H]` for `EXPERT_MAJOR`, in the dtype of `x`, or quantised. Rows that hold no token
        are zero, see the layouts for an exception.
      layout: where the rows are.
      num_dropped: int32 `[]`, rows of this rank that found no place within the capacity.
      topk_ids: for `RANK_MAJOR`, int32 `[C, K]`: the local expert ids of each row, -1 where the k-th expert
        lives elsewhere. Otherwise None.
      topk_weights: for `RANK_MAJOR`, float32 `[C, K]`: the weights beside `topk_ids`, 0 where that is -1; None
        if dispatch was given none. The expert side applies them, since a row stands for several experts.
      quant: the scales of quantised rows; None if rows are not quantised.
    """

    tokens: Array
    layout: DispatchLayoutInfo
    num_dropped: Array
    topk_ids: Array | None = None
    topk_weights: Array | None = None
    quant: QuantOutput | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchHandle:
    """What combine, and later dispatches of the same routing, need to know. A pytree: pass it through jit,
    scan and remat like any other.

    Attributes:
      routing: the implementation's tables.
      row_weights: float32, the routing weights beside the rows: `[C]` for `FLAT` and `EXPERT_MAJOR`, which combine
        applies; `[C, K]` for `RANK_MAJOR`, which the expert side does. None if dispatch was given none.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchRequest:
    """A dispatch that was started, see `MoECommunicator.dispatch_async`. A pytree: pass it through jit and scan like
    any other. What it holds, but for the ticket, is what `dispatch` was given.

    Attributes:
      ticket: int32 `[2]`, by which the receiving half finds what was sent; None for the reference.
    """

    x: Array
    weights: Array | None
    topk_ids: Array | None
    previous_handle: DispatchHandle | None
    quant: QuantConfig | None
    ticket: Array | None
    num_tokens: int = dataclasses.field(metadata={"static": True})
    communicator: Any = dataclasses.field(metadata={"static": True})

    def wait(self) -> tuple[DispatchOutput, DispatchHandle]:
        """What `dispatch` returns, and raises. Call inside `jax.shard_map`."""
        return self.communicator._wait_for_dispatch(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CombineRequest:
    """A combine that was started, see `MoECommunicator.combine_async`. A pytree as `DispatchRequest` is.

    Attributes:
      ticket: int32 `[2]`, by which the receiving half finds what was sent; None for the reference.
    """

    y: Array
    row_weights: Array | None
    routing: Any
    ticket: Array | None
    num_tokens: int = dataclasses.field(metadata={"static": True})
    communicator: Any = dataclasses.field(metadata={"static": True})

    def wait(self) -> Array:
        """What `combine` returns, and raises. Call inside `jax.shard_map`."""
        return self.communicator._wait_for_combine(self)
