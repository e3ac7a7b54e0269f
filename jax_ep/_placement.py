"""Where experts and their replicas are, and which replica a token goes to."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_ep import _ffi
from jax_ep._checks import expect, expect_array, expect_int

Array = jax.Array

# What no backend takes for an expert, nor for "none".
_BAD_ID = -2
# Up to that many ids, comparing each with all before it is one small kernel; sorting them takes several.
_MOST_COMPARED = 1024


class Placement(NamedTuple):
    """Which expert each physical slot holds; GPU g has the slots from `g * P / num_gpus` on.

    Attributes:
      physical_to_logical: int32 `[layers, P]`, the expert in each slot; -1 in those that `replan_experts` left empty.
      logical_to_physical: int32 `[layers, E, X]`, the slots of each expert in ascending order, then -1. X is the most
        replicas of any expert in any layer.
      num_replicas_per_expert: int32 `[layers, E]`, how many of those X are slots.
    """

    physical_to_logical: np.ndarray
    logical_to_physical: np.ndarray
    num_replicas_per_expert: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertPlacement:
    """Where the experts of one layer are. A pytree of arrays: pass it to compiled programs, which then take a new
    placement of as many slots and experts without being compiled anew.

    Made by `from_plan` or `from_slots`. Rank r of R has the slots from `r * P / R` on.

    Attributes:
      physical_to_logical: int32 `[P]`, the expert in each slot, -1 in empty slots.
      slots_by_expert: int32 `[P]`, the slots in the order of their experts, ascending for each; empty ones last.
      first: int32 `[E]`, where the slots of each expert begin in `slots_by_expert`.
      num_replicas_per_expert: int32 `[E]`, how many they are.
    """

    physical_to_logical: Array
    slots_by_expert: Array
    first: Array
    num_replicas_per_expert: Array

    @classmethod
    def from_plan(cls, plan: Placement, layer: int = 0) -> ExpertPlacement:
        """One layer of what `rebalance_experts` or `replan_experts` returned.

        Raises:
          TypeError: `plan` is not what they return.
          ValueError: it has no such layer.
        """
        if not isinstance(plan, Placement):
            raise TypeError(f"plan: expected a Placement, got {type(plan).__name__}")
        num_layers, num_experts = plan.num_replicas_per_expert.shape
        expect_int("layer", layer, minimum=0)
        expect(layer < num_layers, "layer", f"below the {num_layers} layers of the plan", layer)
        return cls.from_slots(plan.physical_to_logical[layer], num_experts)

    @classmethod
    def from_slots(cls, physical_to_logical: ArrayLike | Array, num_experts: int) -> ExpertPlacement:
        """The placement with these experts in its slots.

        Args:
          physical_to_logical: integers `[P]`, the expert in each slot, -1 in empty slots. Every expert has a slot. A
            traced array cannot be checked for that: ids of an expert without a slot then count as out of range.
          num_experts: E, logical experts.

        Raises:
          ValueError, TypeError: the slots are no such array, or leave an expert out.
        """
        num_experts = expect_int("num_experts", num_experts)
        slots: Array
        if isinstance(physical_to_logical, jax.core.Tracer):
            expect_array("physical_to_logical", physical_to_logical, ("P",), jnp.int32)
            slots = physical_to_logical
        else:
            slots = jnp.asarray(_checked_slots(np.asarray(physical_to_logical), num_experts))
        # A stable sort puts each expert's slots together, in ascending order.
        keys = jnp.where((slots >= 0) & (slots < num_experts), slots, num_experts)
        by_expert = jnp.argsort(keys, stable=True).astype(jnp.int32)
        counts = jnp.zeros((num_experts,), jnp.int32).at[keys].add(1, mode="drop")
        first = jnp.cumsum(counts, dtype=jnp.int32) - counts
        return cls(slots, by_expert, first, counts)

    @property
    def num_experts(self) -> int:
        """E, logical experts."""
        return self.num_replicas_per_expert.shape[-1]

    @property
    def num_slots(self) -> int:
        """P, physical experts; `num_experts` of the communicator."""
        return self.physical_to_logical.shape[-1]


def _checked_slots(slots: np.ndarray, num_experts: int) -> np.ndarray:
    if slots.dtype.kind not in "iu":
        raise TypeError(f"physical_to_logical: expected an integer dtype, got {slots.dtype}")
    expect(slots.ndim == 1, "physical_to_logical", "shape [P]", f"shape {list(slots.shape)}")
    outside = slots[(slots < -1) | (slots >= num_experts)]
    wanted = f"-1 or experts from 0 to {num_experts - 1}"
    expect(not outside.size, "physical_to_logical", wanted, outside[:1].tolist())
    missing = np.setdiff1d(np.arange(num_experts), slots)
    expect(not missing.size, "physical_to_logical", "a slot for every expert", f"none for {missing[:1].tolist()}")
    return slots.astype(np.int32)


# ---- which replica --------------------------------------------------------------------------------------------------


@jax.named_scope("jax_ep.to_physical")
def to_physical(topk_ids: Array, placement: ExpertPlacement, rank: Array | int) -> Array:
    """The slots that a rank's tokens go to, for the experts that their router chose.

    The replicas of an expert take turns: the n-th time that a rank's tokens name an expert of m replicas, counted in
    row-major order, it is replica `(n + rank) % m`. So one rank's counts for the replicas of an expert differ by one at
    most, ranks begin with different replicas, and the same arguments give the same slots.

    Args:
      topk_ids: int32, of any shape: logical experts, -1 where unused.
      placement: of these experts; replicated over ranks.
      rank: the rank of these tokens, one integer from 0 on. A traced one cannot be checked for that.

    Returns:
      int32, of the same shape: slots, -1 where unused, and -2 for what is neither -1 nor an expert with a slot.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """
    expect_placement("placement", placement)
    expect_array("topk_ids", topk_ids, getattr(topk_ids, "shape", ()), jnp.int32)
    rank = _checked_rank(rank)
    ids = topk_ids.reshape(-1)
    num_experts = placement.num_experts
    keys = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    experts = jnp.minimum(keys, num_experts - 1)
    counts = placement.num_replicas_per_expert[experts]
    turn = jax.lax.rem(_occurrences(keys, num_experts) + rank, jnp.maximum(counts, 1))
    slots = placement.slots_by_expert[placement.first[experts] + turn]
    none = jnp.where(ids == -1, -1, _BAD_ID)
    return jnp.where((keys < num_experts) & (counts > 0), slots, none).reshape(topk_ids.shape)


def _checked_rank(rank) -> Array:
    """int32 `[]`. A negative one would name another expert's slot."""
    if hasattr(rank, "dtype") and not (rank.shape == () and jnp.issubdtype(rank.dtype, jnp.integer)):
        raise TypeError(f"rank: expected one integer, got {rank.dtype} of shape {list(rank.shape)}")
    if not isinstance(rank, jax.core.Tracer):
        rank = expect_int("rank", rank.item() if hasattr(rank, "item") else rank, minimum=0)
    return jnp.asarray(rank, jnp.int32)


def _occurrences(keys: Array, largest: int) -> Array:
    """int32 [N]: how often each of `keys` [N], numbers from 0 to `largest`, comes before."""
    if keys.size <= _MOST_COMPARED:
        earlier = jnp.tri(keys.size, k=-1, dtype=bool)
        return (earlier & (keys[:, None] == keys)).sum(1, dtype=jnp.int32)
    positions = jnp.arange(keys.size, dtype=jnp.int32)
    positions = _ffi.vary(positions, _ffi.varying_axes(keys))
    in_order, order = jax.lax.sort((keys, positions), num_keys=1, is_stable=True)
    # Few keys: to look each up in all is one kernel of a few steps.
    starts = jnp.searchsorted(in_order, jnp.arange(largest + 1, dtype=jnp.int32), method="scan_unrolled")
    counted = positions - starts.astype(jnp.int32)[in_order]
    return jnp.zeros_like(keys).at[order].set(counted, unique_indices=True)


def expect_placement(argument: str, value: Any) -> None:
    if not isinstance(value, ExpertPlacement):
        raise TypeError(f"{argument}: expected an ExpertPlacement, got {type(value).__name__}")
    slots = value.physical_to_logical
    expect(slots.ndim == 1, argument, "the placement of one layer", f"slots of shape {list(slots.shape)}")
