"""What `MoE.rebalance` needs: the variables of a placement, a new plan, and the arrays that move with it."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from jax_ep._checks import expect
from jax_ep.eplb import rebalance_experts, replan_experts


class ExpertSlots(nnx.Variable):
    """int32 `[P]`, the expert in each slot. No `nnx.Param`."""


class RecordedLoad(nnx.Variable):
    """int32 `[window, E]`, tokens per expert of the last steps, the latest last. No `nnx.Param`."""


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
            if names != path:
                continue
            shape, wanted = list(variable[...].shape), shapes[path]
            # As of factored moments, whose axes nobody names.
            expect(shape == wanted, "optimizer", f"state of its variable's shape {wanted}", f"shape {shape}")
            states.append(variable)
    return states


def _is_state(tree) -> bool:
    return isinstance(tree, nnx.State)


def _is_variable(leaf) -> bool:
    return isinstance(leaf, nnx.Variable)


def placed_like(value: np.ndarray, like: jax.Array) -> jax.Array:
    """A value that all processes hold, as an array that compiled programs take in the place of `like`."""
    value = value.astype(like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
