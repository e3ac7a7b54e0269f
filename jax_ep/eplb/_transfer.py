"""`transfer_experts`: from one placement of experts to another."""

from __future__ import annotations

import collections
import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from jax_ep._checks import expect
from jax_ep.eplb import _rows
from jax_ep.eplb._communicator import EplbCommunicator
from jax_ep.eplb._rounds import Moves, TransferStatistics


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
      ValueError, TypeError: an argument is unusable, or differs between processes.
      RuntimeError: a process did not call it within the timeout; on all that did.
      PeerTimeoutError: with transport "peer", a rank stopped; build another communicator.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    old_slots, new_slots = _checked_slots("old", old), _checked_slots("new", new)
    expect(
        new_slots.shape == old_slots.shape, "new", f"shape {list(old_slots.shape)}", f"shape {list(new_slots.shape)}"
    )
    if communicator is not None:
        expect(not arguments, "communicator", "None beside its arguments", sorted(arguments))
        moved = _transferred(leaves, old_slots, new_slots, communicator, donate)
    else:
        with _communicator_of(leaves, old_slots.ndim - 1, arguments) as built:
            moved = _transferred(leaves, old_slots, new_slots, built, donate)
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


def _transferred(leaves, old: np.ndarray, new: np.ndarray, communicator: EplbCommunicator, donate: bool) -> list:
    num_ranks = communicator.num_ranks
    expect(old.shape[-1] % num_ranks == 0, "old", f"a multiple of the {num_ranks} ranks in slots", old.shape[-1])
    plan = plan_transfer(np.atleast_2d(old), np.atleast_2d(new), num_ranks)
    for path, leaf in leaves:
        _check_leaf(f"params{jax.tree_util.keystr(path)}", leaf, old.shape, communicator)
    shapes = [(tuple(leaf.shape), str(leaf.dtype)) if hasattr(leaf, "shape") else None for _, leaf in leaves]
    placements = hashlib.sha256(old.tobytes() + new.tobytes()).hexdigest()[:16]
    communicator._processes.agree("transfer_experts", f"arrays {shapes}, placements {placements}")
    result, num_rounds = [], 0
    bytes_moved = np.zeros((num_ranks, num_ranks), np.int64)
    for _, leaf in leaves:
        if np.ndim(leaf) == 0 or leaf.size == 0 or plan.changes_nothing:
            result.append(leaf)
            continue
        moved, rounds = _transfer_leaf(leaf, plan, communicator, old.ndim)
        num_rounds += rounds
        local = leaf.sharding.shard_shape(leaf.shape)[old.ndim :]
        bytes_moved += plan.moves.counts(num_ranks) * int(np.prod(local)) * leaf.dtype.itemsize
        result.append(moved)
        if donate:
            leaf.delete()
    communicator._finished(result)
    communicator.statistics = TransferStatistics(num_rounds, bytes_moved)
    return result


def _check_leaf(argument: str, leaf, slots: tuple[int, ...], communicator: EplbCommunicator) -> None:
    if np.ndim(leaf) == 0:
        return
    if not isinstance(leaf, jax.Array):
        raise TypeError(f"{argument}: expected a jax.Array, got {type(leaf).__name__}")
    wanted = f"shape [{', '.join(map(str, slots))}, ...]"
    expect(leaf.shape[: len(slots)] == slots, argument, wanted, f"shape {list(leaf.shape)}")
    _rows.expect_movable(argument, leaf.dtype)
    mesh, axis, dim = communicator.mesh, communicator.axis_name, len(slots) - 1
    sharding: Any = leaf.sharding
    fits = isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names
    fits = fits and np.array_equal(sharding.mesh.devices, mesh.devices)
    if fits:
        mine = _axes_of(sharding.spec, dim)
        fits = mine == (axis,) or (mine == () and communicator.num_ranks == 1)
        fits = fits and (dim == 0 or not _axes_of(sharding.spec, 0))
    expect(fits, argument, f"dimension {dim} sharded over axis {axis!r} of the communicator's mesh", sharding)


class TransferPlan(NamedTuple):
    """What happens to each rank's slots, those of all layers in one row: S = layers * P / R.

    Attributes:
      local_source: int32 `[R, S]`, the slot of the same rank that a slot is filled from; -1 for none.
      moves: from rank to rank.
      copies: int32 `[R, S]`, in the end: the slot that each is a copy of, itself unless an expert that came has several
        slots. None where no slot has to be copied.
    """

    local_source: np.ndarray
    moves: Moves
    copies: np.ndarray | None

    @property
    def changes_nothing(self) -> bool:
        return bool((self.local_source == np.arange(self.local_source.shape[1])).all())


def plan_transfer(old: np.ndarray, new: np.ndarray, num_ranks: int) -> TransferPlan:
    """For placements `[layers, P]`.

    Raises:
      ValueError: an expert of `new` is nowhere in `old`.
    """
    num_layers, slots = len(old), old.shape[1] // num_ranks
    before, after = (a.reshape(num_layers, num_ranks, slots) for a in (old, new))
    same = (after[..., :, None] == before[..., None, :]) & (after[..., :, None] >= 0)
    own = np.broadcast_to(np.arange(slots), after.shape)
    source = np.where(after == before, own, same.argmax(axis=-1))
    source = np.where(same.any(axis=-1), source + slots * np.arange(num_layers)[:, None, None], -1)
    copies = np.broadcast_to(np.arange(num_layers * slots), (num_ranks, num_layers * slots)).copy()
    wanted: dict[tuple[int, int, int], int] = {}  # (layer, expert, rank) -> its first slot there
    for layer, rank, slot in np.argwhere((source < 0) & (after >= 0)).tolist():
        key, local = (layer, int(after[layer, rank, slot]), rank), layer * slots + slot
        copies[rank, local] = wanted.setdefault(key, local)
    local_source = np.moveaxis(source, 1, 0).reshape(num_ranks, -1).astype(np.int32)
    unchanged = (copies == np.arange(copies.shape[1])).all()
    return TransferPlan(local_source, _moves(wanted, before), None if unchanged else copies.astype(np.int32))


def _moves(wanted: dict[tuple[int, int, int], int], before: np.ndarray) -> Moves:
    _, num_ranks, slots = before.shape
    homes: dict[tuple[int, int], dict[int, int]] = {}
    for layer in {layer for layer, _, _ in wanted}:
        for rank in range(num_ranks):
            for slot, expert in enumerate(before[layer, rank].tolist()):
                homes.setdefault((layer, expert), {}).setdefault(rank, layer * slots + slot)
    for layer, expert, _ in wanted:
        there = (layer, expert) in homes
        expect(there, "new", "experts that are in old", f"expert {expert} in layer {layer}")
    holders = [homes[layer, expert] for layer, expert, _ in wanted]
    senders = balanced([list(holder) for holder in holders], num_ranks)
    columns = (
        senders,
        [holder[sender] for holder, sender in zip(holders, senders, strict=True)],
        [rank for _, _, rank in wanted],
        list(wanted.values()),
    )
    return Moves(*(np.array(column, np.int64) for column in columns))


def balanced(choices: list[list[int]], num_ranks: int) -> list[int]:
    """One of each item's choices, such that the most often chosen rank is chosen as rarely as can be.

    A semi-matching (Harvey, Ladner, Lovász and Tamir, 2006): while a chain of items can each pass one item on, from the
    most loaded rank to one with at least two fewer, they do.
    """
    chosen, load = [0] * len(choices), [0] * num_ranks
    for i in sorted(range(len(choices)), key=lambda i: len(choices[i])):
        chosen[i] = min(choices[i], key=lambda rank: load[rank])
        load[chosen[i]] += 1
    while chain := _relieving_chain(choices, chosen, load):
        for i, rank in chain:
            load[chosen[i]] -= 1
            load[rank] += 1
            chosen[i] = rank
    return chosen


def _relieving_chain(choices, chosen, load) -> list[tuple[int, int]]:
    """Items and the ranks they should change to, from the most loaded rank on; none if nothing relieves it."""
    items = collections.defaultdict(list)
    for i, rank in enumerate(chosen):
        items[rank].append(i)
    start = max(range(len(load)), key=lambda rank: load[rank])
    reached: dict[int, tuple[int, int] | None] = {start: None}  # by which item, from which rank
    todo = collections.deque([start])
    while todo:
        rank = todo.popleft()
        if load[rank] <= load[start] - 2:
            chain, at = [], rank
            while (step := reached[at]) is not None:
                chain.append((step[0], at))
                at = step[1]
            return chain[::-1]
        for i in items[rank]:
            for other in choices[i]:
                if other not in reached:
                    reached[other] = (i, rank)
                    todo.append(other)
    return []


def _transfer_leaf(leaf, plan: TransferPlan, communicator: EplbCommunicator, num_slot_dims: int):
    """The leaf with its slots filled anew, and the rounds that took."""
    axis, mesh = communicator.axis_name, leaf.sharding.mesh
    words = not _rows.is_scattered_bitwise(leaf.dtype, mesh.devices.flat[0].platform)
    # Numpy arrays are the same on all processes, which is what jit takes for replicated.
    taken = _taken(leaf.sharding, axis, num_slot_dims, words)(leaf, plan.local_source)
    taken, num_rounds = communicator._mover.move(leaf, taken, plan.moves, num_slot_dims)
    if plan.copies is not None:
        taken = _taken(leaf.sharding, axis, num_slot_dims, False)(taken, plan.copies)
    return _cast(leaf.sharding, leaf.dtype)(taken) if words else taken, num_rounds


@functools.lru_cache(maxsize=256)
def _taken(sharding: NamedSharding, axis: str, num_slot_dims: int, as_words: bool):
    def take(array, index):
        out = _rows.take_slots(_rows.slots_view(array, num_slot_dims), index[jax.lax.axis_index(axis)])
        return (_rows.as_words(out) if as_words else out).reshape(array.shape)

    specs = sharding.spec, PartitionSpec()
    return jax.jit(jax.shard_map(take, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec))


@functools.lru_cache(maxsize=256)
def _cast(sharding: NamedSharding, dtype: jnp.dtype):
    return jax.jit(lambda words: _rows.from_words(words, dtype), out_shardings=sharding)
