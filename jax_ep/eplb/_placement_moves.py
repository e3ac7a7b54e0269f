"""Plans that stay near the current placement: a new plan costs the weights of every expert that a GPU must fetch.

One layer at a time. Edits of a placement are of two kinds: two slots exchange experts, or a slot whose expert has other
replicas takes a replica of another expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jax_ep._checks import expect, expect_int, expect_number
from jax_ep.eplb._planner import (
    ROUNDING,
    Cluster,
    Placement,
    checked_cluster,
    checked_load,
    checked_map,
    checked_slots,
    gpu_loads,
    in_order,
    placement,
    plan,
)


def replan_experts(
    load: ArrayLike,
    current: ArrayLike,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    slack: float = 0.05,
) -> Placement:
    """Like `rebalance_experts`, but moves few experts from where they are.

    A move is a slot whose expert its GPU does not hold yet; see `count_moves`. In each layer:

    - no GPU's load is above `1 + slack` times the largest of what `rebalance_experts` returns;
    - there are never more moves than to that plan with its GPUs (and nodes) renumbered in the best possible way;
    - there are none if the current placement is balanced as well as that, and hierarchical where the plan must be.

    Beyond that, few moves are found by local search, without a guarantee that none fewer would do. Experts that stay on
    their GPU stay in their slot. Empty slots are filled in layers that are planned anew, and left in the others.

    Args:
      load: `[layers, E]`, tokens per expert; any real dtype.
      current: int `[layers, P]`, the expert in each slot now, -1 in empty slots: `Placement.physical_to_logical`.
      num_groups, num_nodes, num_gpus: as in `rebalance_experts`.
      slack: how much more than the plain plan's largest GPU load a GPU may get, as a fraction of it; 0 or more.

    Returns:
      The placement, with P slots as now.

    Raises:
      TypeError, ValueError: as `rebalance_experts`; or `current` does not hold every expert, or `slack` is no number or
        negative.
    """
    scaled = checked_load(load)
    slots = checked_slots("current", current, *scaled.shape)
    num_gpus = expect_int("num_gpus", num_gpus)
    expect(slots.shape[1] % num_gpus == 0, "current", f"a multiple of num_gpus={num_gpus} slots", slots.shape[1])
    cluster = checked_cluster(scaled.shape[1], slots.shape[1], num_groups, num_nodes, num_gpus)
    slack = expect_number("slack", slack)
    expect(0 <= slack < np.inf, "slack", "a finite number of at least 0", slack)
    plain = plan(scaled, cluster)
    limits = gpu_loads(scaled, plain, num_gpus).max(axis=1) * (1 + slack) * (1 + ROUNDING)
    fits = gpu_loads(scaled, slots, num_gpus).max(axis=1) <= limits
    target = _renumber(plain, slots, cluster, scaled.shape[1])
    chosen = slots.copy()
    for layer in range(len(slots)):
        here = _by_node(slots[layer], cluster)
        home_nodes = _nodes_of_groups(here, cluster, scaled.shape[1])
        if not fits[layer] or home_nodes is None:
            there = _by_node(target[layer], cluster)
            found = _replan_layer(scaled[layer], here, there, home_nodes, limits[layer], cluster)
            chosen[layer] = _in_their_places(here, found).reshape(-1)
    return placement(chosen, scaled.shape[1])


def count_moves(current: ArrayLike, new: ArrayLike, num_gpus: int) -> np.ndarray:
    """How many experts' weights GPUs must fetch to get from one placement to another.

    Args:
      current: int `[layers, P]`, the expert in each slot now, -1 in empty slots.
      new: int `[layers, P]`, the same afterwards.
      num_gpus: GPUs; a divisor of P.

    Returns:
      int64 `[layers]`, the slots of `new` whose expert is in none of the same GPU's slots of `current`. Nothing is
      fetched for slots that become or stay empty.

    Raises:
      TypeError: a placement has no integer dtype, or `num_gpus` is no int.
      ValueError: the shapes differ, `num_gpus` does not divide P, or a slot has neither an expert nor -1.
    """
    before, after = checked_map("current", current), checked_map("new", new)
    expect(after.shape == before.shape, "new", f"shape {list(before.shape)}", f"shape {list(after.shape)}")
    num_gpus = expect_int("num_gpus", num_gpus)
    expect(before.shape[1] % num_gpus == 0, "num_gpus", f"a divisor of {before.shape[1]}", num_gpus)
    before, after = (slots.reshape(len(slots), num_gpus, -1) for slots in (before, after))
    stays = (after[..., :, None] == before[..., None, :]).any(axis=-1)
    return np.count_nonzero(~stays & (after >= 0), axis=(1, 2))


# ---- the plain plan, with its GPUs renumbered -----------------------------------------------------------------------


def _renumber(plain: np.ndarray, current: np.ndarray, cluster: Cluster, num_experts: int) -> np.ndarray:
    """`plain` `[layers, P]` with whole GPUs, and whole nodes, in the order of the fewest moves."""
    num_layers, nodes = len(plain), cluster.num_nodes
    gpus = cluster.num_gpus // nodes
    # The last is that of empty slots.
    held = np.zeros((num_layers, nodes, gpus, num_experts + 1), bool)
    np.put_along_axis(held, current.reshape(num_layers, nodes, gpus, -1), True, axis=-1)
    on_nodes = plain.reshape(num_layers, nodes, gpus, -1)
    layer, old_node, _, old_gpu, _, _ = np.ogrid[:num_layers, :nodes, :1, :gpus, :1, :1]
    # [layer, old node, new node, old GPU, new GPU]
    stays = held[layer, old_node, old_gpu, on_nodes[:, None, :, None]].sum(axis=-1)
    gpu_of = _assign(stays.reshape(-1, gpus, gpus)).reshape(num_layers, nodes, nodes, gpus)
    kept = np.take_along_axis(stays, gpu_of[..., None], -1).sum(axis=(-2, -1))
    node_of = _assign(kept)  # the new node for each old one
    layers, old_nodes = np.arange(num_layers)[:, None], np.arange(nodes)
    gpu_of = gpu_of[layers, old_nodes, node_of]
    return on_nodes[layers[..., None], node_of[..., None], gpu_of].reshape(num_layers, -1)


def _assign(score: np.ndarray) -> np.ndarray:
    """The column of each row `[B, n]` that makes the sum of int `score` `[B, n, n]` largest: the Hungarian method
    (Kuhn, 1955; Munkres, 1957), by shortest augmenting paths, for all B at once."""
    num, n, _ = score.shape
    cost = np.pad(-score.astype(np.int64), ((0, 0), (0, 1), (0, 0)))
    far = np.int64(2**62)
    batch = np.arange(num)
    # Column n stands for "none yet": a path starts there. A matched row's potential is kept at its column.
    row_of = np.full((num, n + 1), n, np.int64)
    row_potential, potential = np.zeros((num, n + 1), np.int64), np.zeros((num, n + 1), np.int64)
    for row in range(n):
        row_of[:, n], row_potential[:, n] = row, 0
        column, before = np.full(num, n), np.full((num, n), n)
        distance, visited = np.full((num, n), far), np.zeros((num, n + 1), bool)
        active = np.ones(num, bool)
        while active.any():
            visited[batch[active], column[active]] = True
            reduced = cost[batch, row_of[batch, column]] - row_potential[batch, column, None] - potential[:, :n]
            closer = active[:, None] & ~visited[:, :n] & (reduced < distance)
            distance = np.where(closer, reduced, distance)
            before = np.where(closer, column[:, None], before)
            ahead = np.where(visited[:, :n], far, distance)
            nearest = ahead.argmin(axis=1)
            step = np.where(active, ahead[batch, nearest], 0)[:, None]
            row_potential += step * visited
            potential -= step * visited
            distance -= step * ~visited[:, :n]
            column = np.where(active, nearest, column)
            active &= row_of[batch, column] != n
        while (column != n).any():
            last = np.where(column != n, before[batch, np.minimum(column, n - 1)], n)
            row_of[batch, column], row_potential[batch, column] = row_of[batch, last], row_potential[batch, last]
            column = last
    return np.argsort(row_of[:, :n], axis=1)


def _by_node(slots: np.ndarray, cluster: Cluster) -> np.ndarray:
    """`[P]` as `[num_nodes, GPUs per node, slots per GPU]`."""
    return slots.reshape(cluster.num_nodes, cluster.num_gpus // cluster.num_nodes, -1)


def _in_their_places(here: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The experts of each GPU of `found`, those that the GPU holds already in the slots where they are."""
    size = here.shape[-1]
    result = np.full((here.size // size, size), -1)
    for before, after, row in zip(here.reshape(-1, size), found.reshape(-1, size), result, strict=True):
        left = sorted(after.tolist())
        for slot, expert in enumerate(before.tolist()):
            if expert in left:
                row[slot] = expert
                left.remove(expert)
        row[row < 0] = left
    return result.reshape(here.shape)


# ---- groups on nodes ------------------------------------------------------------------------------------------------


def _nodes_of_groups(slots: np.ndarray, cluster: Cluster, num_experts: int) -> np.ndarray | None:
    """The node of each group, or None where groups are not whole, or nodes have unequal numbers of them."""
    per_node = [np.unique(row[row >= 0]) for row in slots.reshape(cluster.num_nodes, -1)]
    per_node = [np.unique(experts // (num_experts // cluster.num_groups)) for experts in per_node]
    if any(len(mine) != cluster.num_groups // cluster.num_nodes for mine in per_node):
        return None
    # As many groups as places for them: if each has a place, none has two.
    nodes = np.full(cluster.num_groups, -1)
    for node, mine in enumerate(per_node):
        nodes[mine] = node
    return nodes


def _nearby_groupings(per_group: np.ndarray, nodes: np.ndarray, limit: float, cluster: Cluster) -> Iterator[np.ndarray]:
    """`nodes`, and what it becomes as groups are exchanged from the most loaded node on; those whose loads can fit."""
    nodes = nodes.copy()
    for _ in range(cluster.num_groups + 1):
        totals = np.bincount(nodes, per_group, minlength=cluster.num_nodes)
        hot = totals.argmax()
        if totals[hot] <= limit * (cluster.num_gpus // cluster.num_nodes):
            yield nodes.copy()
        pairs = [(a, b) for a in np.flatnonzero(nodes == hot) for b in np.flatnonzero(nodes != hot)]
        largest = [
            max(totals[hot] - per_group[a] + per_group[b], totals[nodes[b]] + per_group[a] - per_group[b])
            for a, b in pairs
        ]
        if not pairs or min(largest) >= totals[hot] * (1 - ROUNDING):
            return
        a, b = pairs[int(np.argmin(largest))]
        nodes[a], nodes[b] = nodes[b], nodes[a]


# ---- one layer ------------------------------------------------------------------------------------------------------


def _replan_layer(
    load: np.ndarray, here: np.ndarray, there: np.ndarray, home_nodes: np.ndarray | None, limit: float, cluster: Cluster
) -> np.ndarray:
    """The best of: `there`, the plain plan, with moves given back; and, for its grouping and one near the current one,
    what the search from the current placement finds. All `[num_nodes, GPUs, slots]`."""
    groups = in_order(load.reshape(cluster.num_groups, -1))
    group_size = len(load) // cluster.num_groups
    per_node = [_Node.of(load, old, np.unique(new), limit) for old, new in zip(here, there, strict=True)]
    starts = [[node.local(new), *node.repaired()] for node, new in zip(per_node, there, strict=True)]
    best, fewest = _fewest(per_node, starts)
    if home_nodes is None or cluster.num_nodes == 1:
        return best
    for nodes in _nearby_groupings(groups, home_nodes, limit, cluster):
        members = np.repeat(nodes, group_size)
        per_node = [_Node.of(load, old, np.flatnonzero(members == v), limit) for v, old in enumerate(here)]
        starts = [node.repaired() for node in per_node]
        if all(starts):
            found, moves = _fewest(per_node, starts)
            return found if moves < fewest else best
    return best


def _fewest(per_node: list[_Node], starts: list[list[np.ndarray]]) -> tuple[np.ndarray, int]:
    """Each node's start of the fewest moves, once what can be is given back; and how many moves in all."""
    found, total = [], 0
    for node, candidates in zip(per_node, starts, strict=True):
        at_first = [node.moves(slots) for slots in candidates]
        # Giving back hardly ever makes good for a start with more than twice the moves, and takes the longest there.
        promising = [slots for slots, moves in zip(candidates, at_first, strict=True) if moves <= 2 * min(at_first)]
        given_back = [node.give_back(slots) for slots in promising]
        moves = [node.moves(slots) for slots in given_back]
        total += min(moves)
        found.append(node.experts[given_back[int(np.argmin(moves))]])
    return np.stack(found), total


class _Node(NamedTuple):
    """One node's part of a layer: n experts, numbered from 0, on its GPUs. The whole layer where planning is global.

    Slots `[GPUs, slots per GPU]` hold these numbers; -1 is an expert of another node, or an empty slot.
    """

    experts: np.ndarray  # [n], ascending: which they are
    load: np.ndarray  # [n]
    old: np.ndarray  # [GPUs, slots], now
    home: np.ndarray  # bool [GPUs, n], whether the GPU has the expert now
    limit: float  # what no GPU's load may exceed

    @staticmethod
    def of(load: np.ndarray, old: np.ndarray, experts: np.ndarray, limit: float) -> _Node:
        numbers = np.full(len(load), -1)
        numbers[experts] = np.arange(len(experts))
        old = np.where(old >= 0, numbers[old], -1)
        home = np.zeros((len(old), len(experts)), bool)
        gpu, slot = np.nonzero(old >= 0)
        home[gpu, old[gpu, slot]] = True
        return _Node(experts, load[experts], old, home, limit)

    def local(self, slots: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.experts, slots)

    def moves(self, slots: np.ndarray) -> int:
        return int(np.count_nonzero(~self.home[np.arange(len(slots))[:, None], slots]))

    def counts(self, slots: np.ndarray) -> np.ndarray:
        return np.bincount(slots.reshape(-1), minlength=len(self.load))

    def gpu_loads(self, slots: np.ndarray) -> np.ndarray:
        return in_order((self.load / self.counts(slots))[slots])

    def complete(self) -> np.ndarray:
        """The old slots, with the experts that are missing, then with replicas, in those of other nodes' experts and in
        empty ones."""
        slots = self.old.copy()
        counts = np.bincount(slots[slots >= 0], minlength=len(self.load))
        missing = np.flatnonzero(counts == 0)
        for expert in missing[np.argsort(-self.load[missing], kind="stable")]:
            free = slots < 0
            if not free.any():
                # The replica whose loss leaves the others the least loaded.
                spare = np.where(counts > 1, self.load / np.maximum(counts - 1, 1), np.inf).argmin()
                free = slots == spare
                counts[spare] -= 1
            self._put(slots, free, expert, counts)
        load = self.load if self.load.any() else np.ones_like(self.load)
        while (slots < 0).any():
            self._put(slots, slots < 0, (load / counts).argmax(), counts)
        return slots

    def _put(self, slots: np.ndarray, allowed: np.ndarray, expert: np.intp, counts: np.ndarray) -> None:
        """Into one of the allowed slots: on the least loaded GPU."""
        per_replica = np.where(slots >= 0, (self.load / np.maximum(counts, 1))[slots], 0)
        totals = np.where(allowed.any(axis=1), in_order(per_replica), np.inf)
        gpu = totals.argmin()
        slots[gpu, allowed[gpu].argmax()] = expert
        counts[expert] += 1

    def repaired(self) -> list[np.ndarray]:
        """Placements within the limit that the search reaches from the old slots; maybe none."""
        start = self.complete()
        found = [self.repair(start, thrifty) for thrifty in (True, False)]
        return [slots for slots in found if slots is not None]

    def repair(self, slots: np.ndarray, thrifty: bool) -> np.ndarray | None:
        """Edits of the most loaded GPU, each the one that removes the most load above the limit, per move if `thrifty`;
        None where no edit helps before all is within the limit."""
        while True:
            totals = self.gpu_loads(slots)
            excess = in_order(np.maximum(totals - self.limit, 0))
            if excess == 0:
                return slots
            edits = self.edits_of_gpu(slots, int(totals.argmax()))
            gain = excess - self.outcome(slots, edits)[0]
            # An edit without a move is worth as much as two of one move.
            worth = gain / np.maximum(self.cost(slots, edits), 0.5) if thrifty else gain
            best = int(worth.argmax()) if worth.size else -1
            if best < 0 or gain[best] <= excess * ROUNDING:
                return None
            slots = edits.applied(slots, best)

    def give_back(self, slots: np.ndarray) -> np.ndarray:
        """Edits that make moves fewer and stay within the limit, until there is none: first what saves
        the most, and of that what leaves the GPUs the most even."""
        while True:
            edits = self.edits_back(slots)
            saved = -self.cost(slots, edits)
            edits, saved = edits.where(saved > 0), saved[saved > 0]
            excess, unevenness = self.outcome(slots, edits)
            saved = np.where(excess <= 0, saved, 0)
            if not saved.any():
                return slots
            slots = edits.applied(slots, int(np.where(saved == saved.max(), unevenness, np.inf).argmin()))

    def edits_of_gpu(self, slots: np.ndarray, gpu: int) -> _Edits:
        """Exchanges of its slots with all others; replacements by its experts anywhere, and by any expert on it."""
        size, every = slots.shape[1], np.arange(slots.size)
        own = every[every // size == gpu]
        spare = np.flatnonzero(self.counts(slots)[slots.reshape(-1)] > 1)
        return _Edits.join(
            _Edits.exchanges(slots, *_pairs(own, every)),
            _Edits.replacements(slots, *_pairs(spare, np.unique(slots[gpu]))),
            _Edits.replacements(slots, *_pairs(spare[spare // size == gpu], np.arange(len(self.load)))),
        )

    def edits_back(self, slots: np.ndarray) -> _Edits:
        """Those that may bring an expert home to a slot that holds one to be fetched."""
        flat, gpus = slots.reshape(-1), np.arange(slots.size) // slots.shape[1]
        fetched = np.flatnonzero(~self.home[gpus, flat])
        slot, other = np.nonzero(self.home[gpus[fetched]][:, flat])
        spare = fetched[self.counts(slots)[flat[fetched]] > 1]
        at, new = np.nonzero(self.home[gpus[spare]])
        return _Edits.join(_Edits.exchanges(slots, fetched[slot], other), _Edits.replacements(slots, spare[at], new))

    def cost(self, slots: np.ndarray, edits: _Edits) -> np.ndarray:
        """How many moves more `[K]` after each edit."""
        flat, size = slots.reshape(-1), slots.shape[1]
        cost = np.zeros(len(edits.first), np.int64)
        for slot, new in ((edits.first, edits.first_new), (edits.second, edits.second_new)):
            cost += self.home[slot // size, flat[slot]].astype(np.int64) - self.home[slot // size, new]
        # A replacement's one slot has been counted twice.
        cost[edits.first == edits.second] //= 2
        return cost

    def outcome(self, slots: np.ndarray, edits: _Edits) -> tuple[np.ndarray, np.ndarray]:
        """After each edit `[K]`: all load above the limit, and by how much the sum of squares of GPU loads grows."""
        totals, size = self.gpu_loads(slots), slots.shape[1]
        above, per_replica = np.maximum(totals - self.limit, 0), self.load / self.counts(slots)
        a, b = edits.first // size, edits.second // size
        change = per_replica[edits.first_new] - per_replica[edits.second_new]
        at_a, at_b = totals[a] + change, totals[b] - change
        excess = in_order(above) - above[a] - above[b] + np.maximum(at_a - self.limit, 0)
        excess += np.maximum(at_b - self.limit, 0)
        unevenness = at_a**2 - totals[a] ** 2 + at_b**2 - totals[b] ** 2
        # Replacing changes what every replica of both experts gets, so it may concern all GPUs.
        alone = edits.first == edits.second
        after = self.loads_after_replacing(slots, edits.first[alone], edits.first_new[alone])
        excess[alone] = in_order(np.maximum(after - self.limit, 0))
        unevenness[alone] = in_order(after**2 - totals**2)
        return excess, unevenness

    def loads_after_replacing(self, slots: np.ndarray, at: np.ndarray, new: np.ndarray) -> np.ndarray:
        """GPU loads `[K, GPUs]` for each of K slots and the expert that it takes."""
        counts, flat, size = self.counts(slots), slots.reshape(-1), slots.shape[1]
        now, more, fewer = (self.load / np.maximum(counts + change, 1) for change in (0, 1, -1))
        old = flat[at]
        on_gpu = np.zeros((len(self.load), len(slots)))
        np.add.at(on_gpu, (flat, np.arange(slots.size) // size), 1)
        after = self.gpu_loads(slots) + on_gpu[old] * (fewer - now)[old, None]
        after += on_gpu[new] * (more - now)[new, None]
        after[np.arange(len(at)), at // size] += more[new] - fewer[old]
        return after


class _Edits(NamedTuple):
    """K edits to choose from: slots, counted through all GPUs, and the expert that each takes, all `[K]`.

    A replacement has one slot alone, which stands in both places.
    """

    first: np.ndarray
    first_new: np.ndarray
    second: np.ndarray
    second_new: np.ndarray

    @staticmethod
    def exchanges(slots: np.ndarray, first: np.ndarray, second: np.ndarray) -> _Edits:
        flat, apart = slots.reshape(-1), first // slots.shape[1] != second // slots.shape[1]
        first, second = first[apart], second[apart]
        return _Edits(first, flat[second], second, flat[first])

    @staticmethod
    def replacements(slots: np.ndarray, at: np.ndarray, new: np.ndarray) -> _Edits:
        changes = slots.reshape(-1)[at] != new
        return _Edits(at[changes], new[changes], at[changes], new[changes])

    @staticmethod
    def join(*several: _Edits) -> _Edits:
        return _Edits(*(np.concatenate(parts) for parts in zip(*several, strict=True)))

    def where(self, chosen: np.ndarray) -> _Edits:
        return _Edits(*(part[chosen] for part in self))

    def applied(self, slots: np.ndarray, index: int) -> np.ndarray:
        flat = slots.reshape(-1).copy()
        flat[self.first[index]], flat[self.second[index]] = self.first_new[index], self.second_new[index]
        return flat.reshape(slots.shape)


def _pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(a, b.size), np.tile(b, a.size)
