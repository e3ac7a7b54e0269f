"""Which slots are filled from where. Numpy alone."""

from __future__ import annotations

import collections
from typing import NamedTuple

import numpy as np

from jax_ep._checks import expect

# In tables of which slots move: fewer are padded, so that a few more do not ask for another program.
_LEAST_SLOTS = 256


class Moves(NamedTuple):
    """Slots to move, numbered on their ranks; the same on all processes. All int `[N]`."""

    src_rank: np.ndarray
    src_slot: np.ndarray
    dst_rank: np.ndarray
    dst_slot: np.ndarray

    def counts(self, num_ranks: int) -> np.ndarray:
        """`[R, R]`: slots by source and destination."""
        pairs = self.src_rank * num_ranks + self.dst_rank
        return np.bincount(pairs, minlength=num_ranks**2).reshape(num_ranks, num_ranks)


class MoveTables(NamedTuple):
    """Which slots each rank sends, in order of their destination, and receives, in order of their source."""

    send_slots: np.ndarray  # [R, N]
    send_begin: np.ndarray  # [R, R], where those for a destination begin
    recv_slots: np.ndarray
    recv_begin: np.ndarray

    @staticmethod
    def of(moves: Moves, num_ranks: int) -> MoveTables:
        counts = moves.counts(num_ranks)
        size = power_of_two(max(_LEAST_SLOTS, counts.sum(0).max(), counts.sum(1).max()))
        send = _by_rank(moves.src_rank, moves.dst_rank, moves.src_slot, num_ranks, size)
        recv = _by_rank(moves.dst_rank, moves.src_rank, moves.dst_slot, num_ranks, size)
        return MoveTables(send, _exclusive_sum(counts), recv, _exclusive_sum(counts.T))


def _by_rank(rank, peer, slot, num_ranks: int, size: int) -> np.ndarray:
    table = np.zeros((num_ranks, size), np.int32)
    order = np.lexsort((np.arange(len(rank)), peer, rank))
    rank, slot = rank[order], slot[order]
    table[rank, np.arange(len(rank)) - np.searchsorted(rank, rank)] = slot
    return table


def _exclusive_sum(counts: np.ndarray) -> np.ndarray:
    return (np.cumsum(counts, axis=1) - counts).astype(np.int32)


def power_of_two(n: int) -> int:
    """At least n, so that few sizes are compiled."""
    return 1 << max(0, int(n) - 1).bit_length()


class TransferPlan(NamedTuple):
    """How the slots of each rank are filled, those of all layers in one row.

    Attributes:
      local_source: int32 `[R, D]`, the slot of the same rank that a slot is filled from; -1 for none.
      moves: from rank to rank.
      copies: int32 `[R, D]`, in the end: the slot that each is a copy of, itself unless what came has several slots.
        None where no slot has to be copied.
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
