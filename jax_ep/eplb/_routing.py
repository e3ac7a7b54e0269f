"""Routing through a placement: which replica a token goes to, and what replicas of an expert have to share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from jax_ep import _ffi
from jax_ep._checks import expect, expect_array, expect_int
from jax_ep.eplb._planner import Placement

Array = jax.Array

# What no backend takes for an expert, nor for "none".
_BAD_ID = -2
# Up to that many ids, comparing each with all before it is one small kernel; sorting them takes several.
_MOST_COMPARED = 1024


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
        expect_int("num_experts", num_experts)
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
      rank: the rank of these tokens, a number or an int32 `[]`.

    Returns:
      int32, of the same shape: slots, -1 where unused, and -2 for what is neither -1 nor an expert with a slot.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """
    expect_placement("placement", placement)
    expect_array("topk_ids", topk_ids, getattr(topk_ids, "shape", ()), jnp.int32)
    ids = topk_ids.reshape(-1)
    num_experts = placement.num_experts
    keys = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    experts = jnp.minimum(keys, num_experts - 1)
    counts = placement.num_replicas_per_expert[experts]
    turn = jax.lax.rem(_occurrences(keys, num_experts) + jnp.asarray(rank, jnp.int32), jnp.maximum(counts, 1))
    slots = placement.slots_by_expert[placement.first[experts] + turn]
    none = jnp.where(ids == -1, -1, _BAD_ID)
    return jnp.where((keys < num_experts) & (counts > 0), slots, none).reshape(topk_ids.shape)


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


# ---- parameters and their gradients ---------------------------------------------------------------------------------


def replicate_experts(params: Any, placement: ExpertPlacement) -> Any:
    """Copies each expert's parameters to its slots.

    On global arrays, in or outside `jit`; its transpose is `sum_replica_gradients`. It may gather all experts on all
    devices, so it is for starts and checkpoints: `transfer_experts` gets from one placement to another.

    Args:
      params: pytree of arrays `[E, ...]`.
      placement: of E experts in P slots.

    Returns:
      The same of `[P, ...]`, split over devices as `params` are where that is possible; zeros in empty slots.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """
    expect_placement("placement", placement)
    slots = placement.physical_to_logical

    def replicate(leaf):
        # Negative numbers would count from the end.
        index = jnp.where(slots >= 0, slots, placement.num_experts)
        return leaf.at[index].get(mode="fill", fill_value=0)

    return _map_experts("params", replicate, params, placement.num_experts, placement.num_slots)


def sum_replica_gradients(grads: Any, placement: ExpertPlacement) -> Any:
    """Adds up the gradients of each expert's replicas: the gradients of what `replicate_experts` copied.

    On global arrays, in or outside `jit`. Sums are kept in float32 at least.

    Args:
      grads: pytree of arrays `[P, ...]`; what is in empty slots does not count.
      placement: of E experts in P slots.

    Returns:
      The same of `[E, ...]`, split over devices as `grads` are where that is possible.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """
    expect_placement("placement", placement)
    sums = functools.partial(_sum_rows, rows=_or_beyond(placement), num_rows=placement.num_experts)
    return _map_experts(
        "grads", lambda leaf: sums(leaf).astype(leaf.dtype), grads, placement.num_slots, placement.num_experts
    )


def share_replica_gradients(grads: Any, placement: ExpertPlacement, axis_name: str = "ep") -> Any:
    """Gives each replica of an expert the sum of all its replicas' gradients, with which an optimizer keeps them equal.

    Inside `jax.shard_map` over `axis_name` on a rank's slots, elsewhere on global arrays. What travels is one array of
    the experts with replicas, at most P - E of them. Sums are kept in float32 at least.

    Args:
      grads: pytree of arrays `[P, ...]`, inside `shard_map` `[P / R, ...]`.
      placement: of E experts in P slots; every expert has one.
      axis_name: the communicator's mesh axis.

    Returns:
      The same. Gradients of experts with one replica, and what is in empty slots, are as they came.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """
    expect_placement("placement", placement)
    is_local = axis_name in jax.sharding.get_abstract_mesh().manual_axes
    num_ranks = jax.lax.axis_size(axis_name) if is_local else 1
    num_local = placement.num_slots // num_ranks
    num_shared = min(placement.num_slots - placement.num_experts, placement.num_slots // 2)
    if num_shared <= 0:
        return _map_experts("grads", lambda leaf: leaf, grads, num_local, num_local)
    is_shared = placement.num_replicas_per_expert > 1
    row_of = jnp.where(is_shared, jnp.cumsum(is_shared, dtype=jnp.int32) - 1, num_shared)
    # More there cannot be, unless an expert of a traced placement has no slot: then there is no right answer.
    fits = is_shared.sum(dtype=jnp.int32) <= num_shared
    rows = row_of.at[_or_beyond(placement)].get(mode="fill", fill_value=num_shared)
    if is_local:
        rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis_name) * num_local, num_local)

    def share(leaf):
        sums = _sum_rows(leaf, rows, num_shared)
        sums = jax.lax.psum(sums, axis_name) if is_local else sums
        mine = sums.astype(leaf.dtype)[jnp.minimum(rows, num_shared - 1)]
        is_mine = (rows < num_shared).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(fits, jnp.where(is_mine, mine, leaf), jnp.nan)

    return _map_experts("grads", share, grads, num_local, num_local)


def tie_replicas(params: Any, placement: ExpertPlacement, axis_name: str = "ep") -> Any:
    """`params` as they are, whose gradients go through `share_replica_gradients`.

    Where the experts' parameters go through this on their way into the layer, an optimizer needs to know nothing of
    replicas. Takes what `share_replica_gradients` takes, and raises what it raises.
    """
    expect_placement("placement", placement)
    return _tie(axis_name, params, placement)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tie(axis_name: str, params, placement):
    del axis_name, placement
    return params


def _tie_forward(axis_name, params, placement):
    return _tie(axis_name, params, placement), placement


def _tie_backward(axis_name, placement, grads):
    return share_replica_gradients(grads, placement, axis_name), None


_tie.defvjp(_tie_forward, _tie_backward)


def _or_beyond(placement: ExpertPlacement) -> Array:
    """The expert in each slot [P]; E in empty ones, which scatters and gathers leave out."""
    slots = placement.physical_to_logical
    return jnp.where(slots >= 0, slots, placement.num_experts)


def _sum_rows(leaf: Array, rows: Array, num_rows: int) -> Array:
    """`[num_rows, ...]`, wide: the sums over the slots of each row. Of two terms they do not depend on the order, by
    which GPUs may add up more of them differently from run to run."""
    wide = leaf.astype(jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32)
    zeros = _ffi.vary(jnp.zeros((num_rows, *leaf.shape[1:]), wide.dtype), _ffi.varying_axes(leaf))
    return zeros.at[rows].add(wide, mode="drop")


def _map_experts(argument: str, function: Callable, tree: Any, num_from: int, num_to: int) -> Any:
    """`function` of each leaf `[num_from, ...]`, to `[num_to, ...]`."""

    def one(leaf):
        shape = getattr(leaf, "shape", ())
        fits = len(shape) > 0 and shape[0] == num_from
        expect(fits, argument, f"arrays of shape [{num_from}, ...]", f"shape {list(shape)}")
        leaf = jnp.asarray(leaf)
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return function(leaf)
        # Gathers and scatters over a split axis have no sharding that JAX would find by itself.
        spec = list(sharding.spec) + [None] * (leaf.ndim - len(sharding.spec))
        names = spec[0] if isinstance(spec[0], tuple) else () if spec[0] is None else (spec[0],)
        num_parts = np.prod([sharding.mesh.shape[name] for name in names], dtype=int)
        spec[0] = spec[0] if num_to % num_parts == 0 else None
        out = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        return jax.sharding.auto_axes(function, out_sharding=out, axes=sharding.mesh.explicit_axes)(leaf)

    return jax.tree.map(one, tree)
