"""What `MoE.rebalance` needs: the variables of a placement, a new plan, and the arrays that move with it."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jax_ep._checks import expect
from jax_ep.eplb import rebalance_experts, replan_experts


class ExpertSlots(nnx.Variable):
    """int32 `[P]`, the expert in each slot. No `nnx.Param`."""


class RecordedLoad(nnx.Variable):
    """int32 `[window, E]`, tokens per expert of the last steps, the latest last. No `nnx.Param`."""


class StepsSincePlan(nnx.Variable):
    """int32 `[1]`, calls of `MoE.rebalance` with `every` since it last planned. No `nnx.Param`."""


def initial_slots(num_experts: int, num_slots: int, num_ranks: int) -> np.ndarray:
    """int32 [P]: as if all experts were equally loaded."""
    load = np.ones((1, num_experts))
    return rebalance_experts(load, num_slots, 1, 1, num_ranks).physical_to_logical[0]


def plan_slots(load: np.ndarray, slots: np.ndarray, slack: float | None, **cluster: int) -> np.ndarray:
    """int32 [layers, P] for tokens per expert [layers, E], near `slots` [layers, P] unless `slack` is None; as they are
    without load."""
    if slack is None:
        plan = rebalance_experts(load, slots.shape[1], **cluster)
    else:
        plan = replan_experts(load, slots, **cluster, slack=slack)
    return np.where(load.any(1, keepdims=True), plan.physical_to_logical, slots)


def path_of(layer: nnx.Module, model: nnx.Module) -> tuple[str, ...]:
    """Where a model has a layer."""
    for path, node in nnx.iter_graph(model):
        if node is layer:
            return tuple(map(str, path))
    raise ValueError(f"model: expected one with this layer in it, got {type(model).__name__} without it")


def states_of(optimizer: nnx.Optimizer, model: nnx.Module, path: tuple[str, ...]) -> list[nnx.Variable]:
    """What an optimizer keeps for the elements of the variable at `path` of its model."""
    variables = nnx.to_flat_state(nnx.state(model))
    shapes = {tuple(map(str, path)): list(variable[...].shape) for path, variable in variables}
    states = []
    # optax keeps them in trees like that of the parameters.
    for tree in jax.tree.leaves(optimizer.opt_state, is_leaf=_is_state):
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable) if _is_state(tree) else []
        for keys, variable in leaves:
            names = tuple(str(getattr(key, "key", key)) for key in keys)
            expect(names in shapes, "model", "that of the optimizer", f"one without {'.'.join(names)}")
            # What another part of the optimizer keeps state for has an `optax.MaskedNode` here.
            if names != path or not hasattr(variable.get_value(), "shape"):
                continue
            shape, wanted = list(variable[...].shape), shapes[path]
            # As of factored moments, whose axes nobody names.
            expect(shape == wanted, "optimizer", f"state of its variable's shape {wanted}", f"shape {shape}")
            states.append(variable)
    return states


def expect_no_other_state_by_slot(optimizer: nnx.Optimizer, num_slots: int) -> None:
    """Arrays outside trees of parameters, as those of `optax.flatten`, may hold anything. Fewer elements than slots, as
    counts and coefficients are, hold nothing of each."""
    state = jax.tree_util.tree_leaves_with_path(
        optimizer.opt_state, is_leaf=lambda leaf: _is_state(leaf) or _is_variable(leaf)
    )
    for path, leaf in state:
        value = leaf.get_value() if _is_variable(leaf) else leaf
        shape = () if _is_state(leaf) else getattr(value, "shape", ())
        wanted = "state in trees of the shapes of the model's parameters"
        got = f"an array of shape {list(shape)} at opt_state{jax.tree_util.keystr(path)}"
        expect(math.prod(shape) < num_slots, "optimizer", wanted, got)


def _is_state(tree) -> bool:
    return isinstance(tree, nnx.State)


def _is_variable(leaf) -> bool:
    return isinstance(leaf, nnx.Variable)


def placed_like(value: np.ndarray, like: jax.Array) -> jax.Array:
    """A value that all processes hold, as an array that compiled programs take in the place of `like`."""
    value = value.astype(like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


# ---- every so many calls --------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    every: int
    calls_left: int


# When to look at each layer's count next.
_looks: weakref.WeakKeyDictionary[nnx.Module, _Look] = weakref.WeakKeyDictionary()
_next_step = jax.jit(lambda steps: steps + 1)


def count_step(layer: nnx.Module, steps: StepsSincePlan, every: int) -> int | None:
    """Adds a call to `steps`, and returns how many there are; None where they are certainly too few.

    The count is on devices, since checkpoints keep it. To read it is to wait for the step that passed it on, so that is
    done once, and then where `every` calls can be full; it may have been set to less meanwhile.
    """
    steps[...] = _next_step(steps[...])
    look = _looks.get(layer)
    if look is not None and look.every == every and look.calls_left > 1:
        _looks[layer] = look._replace(calls_left=look.calls_left - 1)
        return None
    count = int(np.max(steps[...]))
    _looks[layer] = _Look(every, every - count if count < every else every)
    return count
