"""`transfer_experts`: from one placement of experts to another."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from jax_ep._checks import expect, expect_concrete
from jax_ep.eplb._communicator import EplbCommunicator
from jax_ep.eplb._movers import TransferStatistics
from jax_ep.eplb._plan import TransferPlan, plan_transfer
from jax_ep.eplb._rows import expect_movable, slot_size


def transfer_experts(
    params,
    old: ArrayLike,
    new: ArrayLike,
    communicator: EplbCommunicator | None = None,
    *,
    donate: bool = False,
    **arguments,
):
    """Moves experts to their new slots: weights, optimiser state, and all else that there is for each slot.

    The result is bitwise that of a gather: slot s of it is a slot of `params` that holds expert `new[s]`. Experts that
    a rank holds already do not travel. Any other crosses a link once for each rank that needs it, from a replica chosen
    such that the rank that sends most sends as little as can be.

    Args:
      params: a pytree of arrays `[P, ...]`, sharded over the expert-parallel axis in their dimension of P; with maps
        `[layers, P]`, of arrays `[layers, P, ...]`. Later dimensions may be sharded over other axes of the mesh. Leaves
        without dimensions, as an optimiser's count of steps, are returned as they are.
      old: int `[P]` or `[layers, P]`, the expert in each slot now, -1 for none: `Placement.physical_to_logical`, or a
        layer of it. Rank r has the slots from r * P / R on.
      new: the same for afterwards. Slots of -1 become zeros.
      communicator: that moves them; what it did is in its `statistics`. Default one that is built and destroyed here.
      donate: deletes each array of `params` once its new one is made, so that not all are there twice.
      **arguments: of `EplbCommunicator`, where none is given.

    Returns:
      `params` with the experts in their new slots, sharded as before, once all have arrived.

    Raises:
      ValueError, TypeError: an argument is unusable, on any process, or differs between them; on all processes.
      RuntimeError: a process did not call it within the timeout; on all that did.
      PeerTimeoutError: with transport "peer", a rank stopped; build another communicator.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in leaves:
        expect_concrete(f"params{jax.tree_util.keystr(path)}", leaf)
    if communicator is not None:
        expect(not arguments, "communicator", "None beside its arguments", sorted(arguments))
        moved = _transferred(leaves, old, new, communicator, donate)
    else:
        with _communicator_of(leaves, _checked_slots("old", old).ndim - 1, arguments) as built:
            moved = _transferred(leaves, old, new, built, donate)
    return jax.tree.unflatten(structure, moved)


def _checked_slots(argument: str, value: ArrayLike) -> np.ndarray:
    slots = np.asarray(value)
    expect(slots.ndim in (1, 2), argument, "shape [P] or [layers, P]", f"shape {list(slots.shape)}")
    expect(np.issubdtype(slots.dtype, np.integer), argument, "an integer dtype", slots.dtype)
    expect(slots.size == 0 or slots.min() >= -1, argument, "experts from 0 on, or -1", slots.min(initial=0))
    return slots.astype(np.int64)


def _communicator_of(leaves, dim: int, arguments: dict[str, Any]) -> EplbCommunicator:
    for _, leaf in leaves:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and leaf.ndim > dim:
            axes = _axes_of(sharding.spec, dim)
            mesh: Any = sharding.mesh
            return EplbCommunicator(mesh, **(dict(axis_name=axes[0]) if axes else {}) | arguments)
    raise ValueError(f"params: expected an array sharded over a mesh, or a communicator, got {len(leaves)} leaves")


def _axes_of(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    entry = spec[dim] if dim < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _transferred(leaves, old: ArrayLike, new: ArrayLike, communicator: EplbCommunicator, donate: bool) -> list:
    communicator._expect_live("transfer_experts")
    arrays = [leaf for _, leaf in leaves]
    try:
        plan, num_slot_dims = _plan(leaves, old, new, communicator)
    except (TypeError, ValueError, RuntimeError) as error:
        communicator._processes.agree("transfer_experts", "", error)  # which raises it on all processes
        raise
    if len(communicator._processes.all) > 1:
        shapes = [(array.shape, str(array.dtype)) if hasattr(array, "shape") else None for array in arrays]
        placements = hashlib.sha256(np.asarray(old, np.int64).tobytes() + np.asarray(new, np.int64).tobytes())
        text = f"arrays {shapes}, placements {placements.hexdigest()[:16]}"
        communicator._processes.agree("transfer_experts", text)
    if plan.changes_nothing:
        num_ranks = communicator.num_ranks
        communicator.statistics = TransferStatistics(0, np.zeros((num_ranks, num_ranks), np.int64))
        return arrays
    with communicator._moving():
        return _filled(arrays, plan, communicator, num_slot_dims, donate)


def _plan(leaves, old: ArrayLike, new: ArrayLike, communicator: EplbCommunicator) -> tuple[TransferPlan, int]:
    """What moves, once all arguments of this process are checked; and the dimensions of slots."""
    num_ranks = communicator.num_ranks
    old_slots, new_slots = _checked_slots("old", old), _checked_slots("new", new)
    expect(
        new_slots.shape == old_slots.shape, "new", f"shape {list(old_slots.shape)}", f"shape {list(new_slots.shape)}"
    )
    num_slots = old_slots.shape[-1]
    expect(num_slots % num_ranks == 0, "old", f"a multiple of the {num_ranks} ranks in slots", num_slots)
    plan = plan_transfer(np.atleast_2d(old_slots), np.atleast_2d(new_slots), num_ranks)
    for path, leaf in leaves:
        _check_leaf(f"params{jax.tree_util.keystr(path)}", leaf, old_slots.shape, communicator)
    return plan, old_slots.ndim


def _filled(arrays: list, plan: TransferPlan, communicator: EplbCommunicator, num_slot_dims: int, donate: bool) -> list:
    num_rounds, slot_bytes = 0, 0
    filled: dict[int, Any] = {}  # by identity: a tree may hold an array twice
    for array in arrays:
        if id(array) in filled or np.ndim(array) == 0 or array.size == 0:
            filled.setdefault(id(array), array)
            continue
        filled[id(array)], rounds = communicator._mover.fill(array, plan, num_slot_dims)
        num_rounds += rounds
        slot_bytes += slot_size(array, num_slot_dims) * array.dtype.itemsize
        if donate:
            array.delete()
    bytes_moved = plan.moves.counts(communicator.num_ranks) * slot_bytes
    communicator.statistics = TransferStatistics(num_rounds, bytes_moved)
    return jax.block_until_ready([filled[id(array)] for array in arrays])


def _check_leaf(argument: str, leaf, slots: tuple[int, ...], communicator: EplbCommunicator) -> None:
    if np.ndim(leaf) == 0:
        return
    if not isinstance(leaf, jax.Array):
        raise TypeError(f"{argument}: expected a jax.Array, got {type(leaf).__name__}")
    wanted = f"shape [{', '.join(map(str, slots))}, ...]"
    expect(leaf.shape[: len(slots)] == slots, argument, wanted, f"shape {list(leaf.shape)}")
    expect_movable(argument, leaf.dtype)
    expect(not leaf.is_deleted(), argument, "an array that is there", "one that was deleted")
    mesh, axis, dim = communicator.mesh, communicator.axis_name, len(slots) - 1
    sharding: Any = leaf.sharding
    fits = isinstance(sharding, NamedSharding) and _has_devices_of(sharding.mesh, mesh)
    if fits:
        mine = _axes_of(sharding.spec, dim)
        fits = mine == (axis,) or (mine == () and communicator.num_ranks == 1)
        fits = fits and (dim == 0 or not _axes_of(sharding.spec, 0))
    expect(fits, argument, f"dimension {dim} sharded over axis {axis!r} of the communicator's mesh", sharding)


def _has_devices_of(mesh: Any, other: jax.sharding.Mesh) -> bool:
    return mesh == other or (mesh.axis_names == other.axis_names and np.array_equal(mesh.devices, other.devices))
