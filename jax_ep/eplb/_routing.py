"""What the replicas of an expert share: parameters, and the sum of their gradients.

Sums are taken in one order, that of slots, and never by scatters that add: GPUs do those in any order.
"""

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

    On global arrays, in or outside `jit`; its gradient is `sum_replica_gradients`, and there is no forward mode. It may
    gather all experts on all devices, so it is for starts and checkpoints: `transfer_experts` gets from one placement
    to another.

    Args:
      params: pytree of arrays `[E, ...]`, of any dtype.
      placement: of E experts in P slots.

    Returns:
      The same of `[P, ...]`, split over devices as `params` are where that is possible; zeros in empty slots.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """
    expect_placement("placement", placement)
    return _replicate(params, placement)


@jax.custom_vjp
def _replicate(params, placement: ExpertPlacement):
    index = _or_beyond(placement)

    def replicate(leaf):
        return leaf.at[index].get(mode="fill", fill_value=0)

    return _map_experts("params", replicate, params, placement.num_experts, placement.num_slots)


def _replicate_forward(params, placement):
    return _replicate(params, placement), placement


def _replicate_backward(placement, grads):
    return sum_replica_gradients(grads, placement), None


_replicate.defvjp(_replicate_forward, _replicate_backward)


def sum_replica_gradients(grads: Any, placement: ExpertPlacement) -> Any:
    """Adds up the gradients of each expert's replicas: the gradients of what `replicate_experts` copied.

    On global arrays, in or outside `jit`. Sums are kept in float32 at least, and are bitwise the same each time.

    Args:
      grads: pytree of arrays `[P, ...]`, floating or complex, or float0 as JAX has it for integers. What is in empty
        slots does not count.
      placement: of E experts in P slots.

    Returns:
      The same of `[E, ...]`, in the same dtypes, split over devices as `grads` are where that is possible.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """
    expect_placement("placement", placement)
    sums = functools.partial(_sum_rows, rows=_or_beyond(placement), num_rows=placement.num_experts)
    return _map_gradients(lambda leaf: sums(leaf).astype(leaf.dtype), grads, placement.num_slots, placement.num_experts)


def share_replica_gradients(grads: Any, placement: ExpertPlacement, axis_name: str = "ep") -> Any:
    """Gives each replica of an expert the sum of all its replicas' gradients, with which an optimizer keeps them equal.

    Inside `jax.shard_map` over `axis_name` on a rank's slots, elsewhere on global arrays. What travels is one array of
    the experts with replicas, at most P - E of them. Sums are kept in float32 at least; a rank's are bitwise the same
    each time, and those of all ranks as the all-reduce makes them.

    Args:
      grads: pytree of arrays `[P, ...]`, inside `shard_map` `[P / R, ...]`; floating or complex, or float0 as JAX has
        it for integers.
      placement: of E experts in P slots; every expert has one.
      axis_name: the communicator's mesh axis.

    Returns:
      The same, in the same shapes and dtypes. Gradients of experts with one replica, what is in empty slots, and
      float0 are as they came.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """
    expect_placement("placement", placement)
    is_local = axis_name in jax.sharding.get_abstract_mesh().manual_axes
    num_ranks = jax.lax.axis_size(axis_name) if is_local else 1
    num_local = placement.num_slots // num_ranks
    num_more = placement.num_slots - placement.num_experts
    num_shared = min(num_more, placement.num_slots // 2)
    if num_shared <= 0:
        return _map_gradients(lambda leaf: leaf, grads, num_local, num_local)
    is_shared = placement.num_replicas_per_expert > 1
    row_of = jnp.where(is_shared, jnp.cumsum(is_shared, dtype=jnp.int32) - 1, num_shared)
    # More there cannot be, unless an expert of a traced placement has no slot: then there is no right answer.
    fits = jnp.maximum(placement.num_replicas_per_expert - 1, 0).sum(dtype=jnp.int32) <= num_more
    rows = row_of.at[_or_beyond(placement)].get(mode="fill", fill_value=num_shared)
    if is_local:
        rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis_name) * num_local, num_local)

    def share(leaf):
        if is_local:
            sums = jax.lax.psum(_sum_local_rows(leaf, rows, num_shared, most=2 * num_more), axis_name)
        else:
            sums = _sum_rows(leaf, rows, num_shared)
        mine = sums.astype(leaf.dtype)[jnp.minimum(rows, num_shared - 1)]
        return jnp.where(fits, jnp.where(_beside(rows < num_shared, leaf), mine, leaf), jnp.nan)

    return _map_gradients(share, grads, num_local, num_local)


def tie_replicas(params: Any, placement: ExpertPlacement, axis_name: str = "ep") -> Any:
    """`params` as they are, whose gradients go through `share_replica_gradients`.

    Where the experts' parameters go through this on their way into the layer, an optimizer needs to know nothing of
    replicas. Takes arrays of those shapes, of any dtype: integers, as of quantised kernels, have no gradient. Raises
    what `share_replica_gradients` raises.
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
    """The expert in each slot [P]; E in empty ones, which gathers leave out. Negative numbers would count from the
    end."""
    slots = placement.physical_to_logical
    return jnp.where(slots >= 0, slots, placement.num_experts)


# ---- sums in one order ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="num_rows")
def _sum_rows(leaf: Array, rows: Array, num_rows: int) -> Array:
    """`[num_rows, ...]`, wide: the sums over the slots of each row. In steps that XLA partitions however slots are
    sharded, and each of which reads them all."""
    order = jnp.argsort(rows, stable=True)
    in_order, sums = rows[order], leaf.astype(_wide(leaf.dtype))[order]
    shift = 1
    while shift < len(rows):
        # Each slot has the sum of the `shift` from it on, as far as they are of its row.
        more = jnp.where(_beside(in_order[shift:] == in_order[:-shift], leaf), sums[shift:], 0)
        sums = sums + jnp.pad(more, [(0, shift)] + [(0, 0)] * (leaf.ndim - 1))
        # Fused with the next, this step would be done twice in it, the one before four times.
        sums = jax.lax.optimization_barrier(sums)
        shift *= 2
    wanted = jnp.arange(num_rows, dtype=rows.dtype)
    first = jnp.searchsorted(in_order, wanted, method="scan_unrolled")
    is_there = in_order.at[first].get(mode="fill", fill_value=num_rows) == wanted
    return jnp.where(_beside(is_there, leaf), sums.at[first].get(mode="fill", fill_value=0), 0)


def _sum_local_rows(leaf: Array, rows: Array, num_rows: int, most: int) -> Array:
    """The same on one device, of `most` slots at most that are of any row: one after the other, each read once."""
    order = jnp.argsort(rows, stable=True)

    def add(i, sums):
        row = rows[order[i]]
        at = jnp.minimum(row, num_rows - 1)
        now = jax.lax.dynamic_index_in_dim(sums, at)
        more = jax.lax.dynamic_index_in_dim(leaf, order[i]).astype(sums.dtype)
        return jax.lax.dynamic_update_index_in_dim(sums, jnp.where(row < num_rows, now + more, now), at, 0)

    zeros = jnp.zeros((num_rows, *leaf.shape[1:]), _wide(leaf.dtype))
    zeros = _ffi.vary(zeros, _ffi.varying_axes(leaf) | _ffi.varying_axes(rows))
    return jax.lax.fori_loop(0, min(most, len(rows)), add, zeros)


def _wide(dtype) -> Any:
    """What sums are kept in."""
    return dtype if dtype.itemsize >= 4 else jnp.float32


def _beside(slots: Array, leaf: Array) -> Array:
    """`[P]` that broadcasts to a leaf's `[P, ...]`."""
    return slots.reshape(-1, *[1] * (leaf.ndim - 1))


# ---- pytrees of experts ---------------------------------------------------------------------------------------------


def _map_gradients(function: Callable, grads: Any, num_from: int, num_to: int) -> Any:
    """`_map_experts` of gradients. Those of integers, numpy's zeros of float0, get no more than their new shape."""

    def has_none(leaf) -> bool:
        return getattr(leaf, "dtype", None) == jax.dtypes.float0

    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if not has_none(leaf) and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            name = f"grads{jax.tree_util.keystr(path)}"
            raise TypeError(f"{name}: expected a floating or complex dtype, or float0, got {jnp.result_type(leaf)}")

    def one(leaf):
        return np.zeros((num_to, *leaf.shape[1:]), jax.dtypes.float0) if has_none(leaf) else function(leaf)

    return _map_experts("grads", one, grads, num_from, num_to)


def _map_experts(argument: str, function: Callable, tree: Any, num_from: int, num_to: int) -> Any:
    """`function` of each leaf `[num_from, ...]`, to `[num_to, ...]`."""

    def one(path, leaf):
        shape = getattr(leaf, "shape", ())
        fits = len(shape) > 0 and shape[0] == num_from
        name = f"{argument}{jax.tree_util.keystr(path)}"
        expect(fits, name, f"arrays of shape [{num_from}, ...]", f"shape {list(shape)}")
        if leaf.dtype == jax.dtypes.float0:
            return function(leaf)
        leaf = jnp.asarray(leaf)
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return function(leaf)
        # Gathers over a split axis have no sharding that JAX would find by itself.
        spec = list(sharding.spec) + [None] * (leaf.ndim - len(sharding.spec))
        names = spec[0] if isinstance(spec[0], tuple) else () if spec[0] is None else (spec[0],)
        num_parts = np.prod([sharding.mesh.shape[name] for name in names], dtype=int)
        spec[0] = spec[0] if num_to % num_parts == 0 else None
        out = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        return jax.sharding.auto_axes(function, out_sharding=out, axes=sharding.mesh.explicit_axes)(leaf)

    return jax.tree_util.tree_map_with_path(one, tree)
