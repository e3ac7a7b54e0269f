"""Plans where replicas of experts go, from how many tokens each expert gets: numpy alone, no device.

What each step minimises is a maximum over GPUs, and each is done for all layers at once. Sums that decide anything are
taken in a fixed order, by `cumsum`, and sorts are stable: a plan is the same on every platform.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jax_ep._checks import expect, expect_int
from jax_ep._placement import Placement

# Of a GPU's load: a smaller gain is rounding.
ROUNDING = 1e-9


class Cluster(NamedTuple):
    """Sizes of one planning problem. Global planning is that of one node with one group."""

    num_replicas: int
    num_groups: int
    num_nodes: int
    num_gpus: int


def rebalance_experts(load: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Placement:
    """Replicates the most loaded experts, and places all so that GPUs are as evenly loaded as it finds.

    If `num_nodes` divides `num_groups`, the plan is hierarchical: whole groups of experts go to nodes, and an expert's
    replicas to GPUs of its node. Otherwise it is global: groups and nodes may be any, and play no part. No layer's
    largest GPU load is above that of EPLB (DeepSeek, 2025, https://github.com/deepseek-ai/EPLB), whose steps these are,
    each followed by exchanges.

    Args:
      load: `[layers, E]`, tokens per expert, or anything proportional; any real dtype.
      num_replicas: P, physical slots of a layer on all GPUs; a multiple of `num_gpus`, at least E.
      num_groups: groups of E / num_groups consecutive experts, from which a group-limited router chooses; else 1. A
        divisor of E where the plan is hierarchical.
      num_nodes: nodes; a divisor of `num_gpus` where the plan is hierarchical.
      num_gpus: GPUs, or ranks, each with P / num_gpus slots.

    Returns:
      The placement. Every expert has a slot, and the same arguments give the same placement.

    Raises:
      TypeError: `load` has no real dtype, or a number is no int.
      ValueError: loads are negative, infinite or NaN, or a size does not fit the others.
    """
    scaled = checked_load(load)
    cluster = checked_cluster(scaled.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    return placement(plan(scaled, cluster), scaled.shape[1])


def gpu_imbalance(load: ArrayLike, physical_to_logical: ArrayLike, num_gpus: int) -> np.ndarray:
    """The largest GPU load over the mean, if an expert's tokens are split evenly over its replicas.

    Args:
      load: `[layers, E]`, tokens per expert; any real dtype.
      physical_to_logical: int `[layers, P]`, the expert in each slot, -1 in empty slots.
      num_gpus: GPUs; a divisor of P.

    Returns:
      float64 `[layers]`, 1 is even, `num_gpus` is all on one. 1 for a layer without load.

    Raises:
      TypeError, ValueError: as `rebalance_experts`; or `physical_to_logical` does not hold every expert.
    """
    scaled = checked_load(load)
    slots = checked_slots("physical_to_logical", physical_to_logical, *scaled.shape)
    num_gpus = expect_int("num_gpus", num_gpus)
    expect(slots.shape[1] % num_gpus == 0, "num_gpus", f"a divisor of the {slots.shape[1]} slots", num_gpus)
    total = in_order(scaled)
    largest = gpu_loads(scaled, slots, num_gpus).max(axis=1)
    return np.where(total > 0, largest * num_gpus / np.where(total > 0, total, 1), 1.0)


# ---- arguments ------------------------------------------------------------------------------------------------------


def checked_load(load: ArrayLike) -> np.ndarray:
    """float64 `[layers, E]`, each layer scaled by a power of two to at most 1, so that no sum overflows."""
    values = np.asarray(load)
    # Those of ml_dtypes, as bfloat16, are of kind V.
    real = values.dtype.kind in "iuf" or (values.dtype.kind == "V" and "float" in values.dtype.name)
    if not real:
        raise TypeError(f"load: expected a real dtype, got {values.dtype}")
    expect(values.ndim == 2 and values.size > 0, "load", "shape [layers, E]", f"shape {list(values.shape)}")
    values = values.astype(np.float64)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        layer, expert = (int(i) for i in np.argwhere(wrong)[0])
        got = f"{values[layer, expert]} for expert {expert} of layer {layer}"
        raise ValueError(f"load: expected finite numbers of at least 0, got {got}")
    return np.ldexp(values, -np.frexp(values.max(axis=1, keepdims=True))[1])


def checked_cluster(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Cluster:
    num_groups, num_nodes = expect_int("num_groups", num_groups), expect_int("num_nodes", num_nodes)
    num_gpus, num_replicas = expect_int("num_gpus", num_gpus), expect_int("num_replicas", num_replicas)
    expect(num_replicas >= num_experts, "num_replicas", f"at least the {num_experts} experts", num_replicas)
    expect(num_replicas % num_gpus == 0, "num_replicas", f"a multiple of num_gpus={num_gpus}", num_replicas)
    if num_groups % num_nodes:
        return Cluster(num_replicas, 1, 1, num_gpus)
    expect(num_gpus % num_nodes == 0, "num_gpus", f"a multiple of num_nodes={num_nodes}", num_gpus)
    expect(num_experts % num_groups == 0, "num_groups", f"a divisor of the {num_experts} experts", num_groups)
    return Cluster(num_replicas, num_groups, num_nodes, num_gpus)


def checked_map(argument: str, physical_to_logical: ArrayLike) -> np.ndarray:
    """int64 `[layers, P]`, with -1 in empty slots."""
    slots = np.asarray(physical_to_logical)
    if slots.dtype.kind not in "iu":
        raise TypeError(f"{argument}: expected an integer dtype, got {slots.dtype}")
    expect(slots.ndim == 2, argument, "shape [layers, P]", f"shape {list(slots.shape)}")
    slots = slots.astype(np.int64)
    expect(not (slots < -1).any(), argument, "experts from 0 on, or -1", slots[slots < -1][:1].tolist())
    return slots


def checked_slots(argument: str, physical_to_logical: ArrayLike, num_layers: int, num_experts: int) -> np.ndarray:
    """int64 `[layers, P]` that hold every expert, with -1 in empty slots."""
    slots = checked_map(argument, physical_to_logical)
    expect(len(slots) == num_layers, argument, f"shape [{num_layers}, P]", f"shape {list(slots.shape)}")
    outside = slots[slots >= num_experts]
    expect(not outside.size, argument, f"-1 or experts from 0 to {num_experts - 1}", outside[:1].tolist())
    missing = np.argwhere(replica_counts(slots, num_experts) == 0)
    expect(not missing.size, argument, "every expert in every layer", f"none of [layer, expert] {missing[:1].tolist()}")
    return slots


# ---- loads ----------------------------------------------------------------------------------------------------------


def in_order(values: np.ndarray) -> np.ndarray:
    """The sum over the last axis, from first to last: `sum` leaves the order open."""
    return np.cumsum(values, axis=-1)[..., -1]


def replica_counts(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """int64 `[layers, E]` of `[layers, P]`."""
    layers = np.arange(slots.shape[0])[:, None] * num_experts
    counts = np.bincount((slots + layers)[slots >= 0], minlength=slots.shape[0] * num_experts)
    return counts.reshape(-1, num_experts)


def gpu_loads(load: np.ndarray, slots: np.ndarray, num_gpus: int) -> np.ndarray:
    """`[layers, num_gpus]` of slots that hold every expert."""
    per_replica = load / replica_counts(slots, load.shape[1])
    per_slot = np.where(slots >= 0, np.take_along_axis(per_replica, np.maximum(slots, 0), 1), 0)
    return in_order(per_slot.reshape(slots.shape[0], num_gpus, -1))


def placement(slots: np.ndarray, num_experts: int) -> Placement:
    """The three maps of `[layers, P]`."""
    num_layers, num_slots = slots.shape
    counts = replica_counts(slots, num_experts)
    inverse = np.full((num_layers, num_experts, counts.max(initial=1)), -1, np.int32)
    by_expert = np.argsort(slots, axis=1, kind="stable")
    experts = np.take_along_axis(slots, by_expert, 1)
    # Empty slots come first.
    first = np.cumsum(counts, axis=1) - counts + np.count_nonzero(slots < 0, axis=1)[:, None]
    replica = np.arange(num_slots) - np.take_along_axis(first, np.maximum(experts, 0), 1)
    layer, at = np.nonzero(experts >= 0)
    inverse[layer, experts[layer, at], replica[layer, at]] = by_expert[layer, at]
    return Placement(slots.astype(np.int32), inverse, counts.astype(np.int32))


# ---- planning -------------------------------------------------------------------------------------------------------


def plan(load: np.ndarray, cluster: Cluster) -> np.ndarray:
    """int64 `[layers, P]`, the expert in each slot."""
    per_group = in_order(load.reshape(load.shape[0], cluster.num_groups, -1))
    first = _longest_first(per_group, cluster.num_nodes)
    slots = _plan_nodes(load, first, cluster)
    # More even nodes nearly always make more even GPUs, but not for certain: keep the better of both.
    groups = _exchange(per_group, first)
    changed = np.flatnonzero((groups != first).any(axis=(1, 2)))
    if not changed.size:
        return slots
    other = _plan_nodes(load[changed], groups[changed], cluster)
    largest, other_largest = (
        gpu_loads(load[changed], candidate, cluster.num_gpus).max(axis=1) for candidate in (slots[changed], other)
    )
    better = other_largest < largest
    slots[changed[better]] = other[better]
    return slots


def _plan_nodes(load: np.ndarray, groups: np.ndarray, cluster: Cluster) -> np.ndarray:
    """`[layers, P]`, with groups `[layers, num_nodes, num_groups / num_nodes]` on their nodes."""
    num_layers, num_experts = load.shape
    within = np.arange(num_experts // cluster.num_groups)
    experts = groups[..., None] * within.size + within
    experts = experts.reshape(num_layers * cluster.num_nodes, -1)
    per_expert = np.take_along_axis(load, experts.reshape(num_layers, -1), 1).reshape(experts.shape)
    # Without load, replicas of all are as good as of one, and nobody knows the next load.
    per_expert = np.where(per_expert.any(axis=1, keepdims=True), per_expert, 1.0)
    slots = _plan_rows(per_expert, cluster.num_replicas // cluster.num_nodes, cluster.num_gpus // cluster.num_nodes)
    return np.take_along_axis(experts, slots, 1).reshape(num_layers, -1)


def _plan_rows(load: np.ndarray, num_replicas: int, num_gpus: int) -> np.ndarray:
    """The expert in each slot `[rows, num_replicas]` of a node, or of all where planning is global, for experts
    `[rows, n]`."""
    counts = _replicate(load, num_replicas, num_replicas)
    slots, largest = _pack(load, counts, num_gpus)
    # A GPU gains nothing from a second replica of an expert. So one per GPU can be better, if there is a choice.
    capped = _replicate(load, num_replicas, max(num_gpus, -(-num_replicas // load.shape[1])))
    changed = np.flatnonzero((capped != counts).any(axis=1))
    if changed.size:
        other, other_largest = _pack(load[changed], capped[changed], num_gpus)
        better = other_largest < largest[changed]
        slots[changed[better]] = other[better]
    return slots


def _replicate(load: np.ndarray, num_replicas: int, most: int) -> np.ndarray:
    """Replicas of each of n experts `[rows, n]`, at most `most`. Each further one goes to the largest load per replica,
    which makes the largest that is left as small as can be."""
    rows = np.arange(len(load))
    counts = np.ones(load.shape, np.int64)
    per_replica = load.copy()
    for _ in range(num_replicas - load.shape[1]):
        chosen = np.where(counts < most, per_replica, -1).argmax(axis=1)
        counts[rows, chosen] += 1
        per_replica[rows, chosen] = load[rows, chosen] / counts[rows, chosen]
    return counts


def _pack(load: np.ndarray, counts: np.ndarray, num_gpus: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert in each slot `[rows, P]`, and the largest GPU load `[rows]`."""
    num_rows, num_experts = load.shape
    replicas = np.repeat(np.arange(counts.size), counts.reshape(-1)).reshape(num_rows, -1)
    per_replica = (load / counts).reshape(-1)[replicas]
    packs = _exchange(per_replica, _longest_first(per_replica, num_gpus)).reshape(num_rows, -1)
    totals = in_order(np.take_along_axis(per_replica, packs, 1).reshape(num_rows, num_gpus, -1))
    return np.take_along_axis(replicas, packs, 1) % num_experts, totals.max(axis=1)


def _longest_first(load: np.ndarray, num_packs: int) -> np.ndarray:
    """Items of `[rows, n]` in packs of equal size `[rows, num_packs, n / num_packs]`: each, from the largest load on,
    to the pack of the least load that has room (LPT; Graham, 1969)."""
    num_rows, num_items = load.shape
    rows, size = np.arange(num_rows), num_items // num_packs
    packs = np.empty((num_rows, num_packs, size), np.int64)
    totals, filled = np.zeros((num_rows, num_packs)), np.zeros((num_rows, num_packs), np.int64)
    by_load = np.argsort(-load, axis=1, kind="stable")
    for item in by_load.T:
        pack = totals.argmin(axis=1)
        packs[rows, pack, filled[rows, pack]] = item
        filled[rows, pack] += 1
        # Full packs are out of the running.
        totals[rows, pack] = np.where(filled[rows, pack] == size, np.inf, totals[rows, pack] + load[rows, item])
    return packs


def _exchange(load: np.ndarray, packs: np.ndarray) -> np.ndarray:
    """Exchanges items between the most loaded pack of a row and another, the best pair at a time, until none helps."""
    packs = packs.copy()
    loads = np.take_along_axis(load, packs.reshape(len(packs), -1), 1).reshape(packs.shape)
    _, num_packs, size = packs.shape
    active = np.arange(len(packs))
    while active.size and num_packs > 1:
        rows, now = np.arange(active.size), loads[active]
        totals = in_order(now)
        hot = totals.argmax(axis=1)
        largest = totals[rows, hot]
        # Moving a load d from the hot pack to another leaves the larger of both at mean + abs(d - half their distance).
        half = (largest[:, None] - totals) / 2
        left = now[rows, hot][:, :, None, None] - (now + half[:, :, None])[:, None]
        np.abs(left, out=left)
        left += (largest[:, None] - half)[:, None, :, None]
        left = left.reshape(active.size, -1)
        best = left.argmin(axis=1)
        helps = left[rows, best] < largest * (1 - ROUNDING)
        active, hot, best = active[helps], hot[helps], best[helps]
        mine, other, theirs = np.unravel_index(best, (size, num_packs, size))
        for values in (packs, loads):
            values[active, hot, mine], values[active, other, theirs] = (
                values[active, other, theirs],
                values[active, hot, mine],
            )
    return packs
