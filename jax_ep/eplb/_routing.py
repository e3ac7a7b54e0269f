"""What the replicas of an expert share: parameters, and the sum of their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_ep import _ffi
from jax_ep._checks import expect
from jax_ep._placement import ExpertPlacement, expect_placement

Array = jax.Array

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
