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
    experts, numbers = np.unique([old, new], return_inverse=True)
    before, after = numbers.reshape(2, num_layers, num_ranks, slots)
    layer, rank, slot = (indices := np.indices(before.shape))[0], indices[1], indices[2]
    slot += slots * layer
    # The first slot of each expert on each rank. Of several values for an element, the last is kept.
    backwards = np.s_[..., ::-1]
    homes = np.full((num_layers, num_ranks, len(experts)), -1)
    homes[layer[backwards], rank[backwards], before[backwards]] = slot[backwards]
    homes[:, :, experts < 0] = -1
    is_wanted = experts[after] >= 0
    source = np.where((after == before) & is_wanted, slot, homes[layer, rank, after])

    missing = (source < 0) & is_wanted
    layer, rank, slot, expert = layer[missing], rank[missing], slot[missing], after[missing]
    # An expert that gets several slots of a rank comes there once.
    wanted = np.ravel_multi_index((layer, expert, rank), (num_layers, len(experts), num_ranks))
    _, first, of_first = np.unique(wanted, return_index=True, return_inverse=True)
    copies = np.broadcast_to(np.arange(num_layers * slots), (num_ranks, num_layers * slots)).copy()
    copies[rank, slot] = slot[first][of_first]
    return TransferPlan(
        np.moveaxis(source, 1, 0).reshape(num_ranks, -1).astype(np.int32),
        _moves(homes, experts, layer[first], expert[first], rank[first], slot[first]),
        copies.astype(np.int32) if len(first) < len(slot) else None,
    )


def _moves(homes: np.ndarray, experts: np.ndarray, layer, expert, dst_rank, dst_slot) -> Moves:
    """Of experts to slots of ranks, from those `homes` `[layers, R, E]` that make senders equally busy."""
    slots = homes[layer, :, expert]  # [N, R]
    nowhere = (slots < 0).all(axis=1)
    if nowhere.any():
        first = int(np.argmax(nowhere))
        expect(False, "new", "experts that are in old", f"expert {experts[expert[first]]} in layer {layer[first]}")
    senders = balanced(slots >= 0)
    return Moves(senders, slots[np.arange(len(layer)), senders], dst_rank, dst_slot)


def balanced(choices: np.ndarray) -> np.ndarray:
    """One of each item's choices, bool `[N, R]`, such that the most often chosen rank is as rarely chosen as can be.

    A semi-matching (Harvey, Ladner, Lovász and Tamir, 2006): while a chain of items can each pass one item on, from the
    most loaded rank to one with at least two fewer, they do.
    """
    chosen = choices.argmax(axis=1)
    several = np.flatnonzero(choices.sum(axis=1) > 1)
    load = np.bincount(np.delete(chosen, several), minlength=choices.shape[1]).tolist()
    ranks = [np.flatnonzero(row).tolist() for row in choices[several]]
    picked = [0] * len(ranks)
    for i in sorted(range(len(ranks)), key=lambda i: len(ranks[i])):
        picked[i] = min(ranks[i], key=lambda rank: load[rank])
        load[picked[i]] += 1
    while chain := _relieving_chain(ranks, picked, load):
        for i, rank in chain:
            load[picked[i]] -= 1
            load[rank] += 1
            picked[i] = rank
    chosen[several] = picked
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
