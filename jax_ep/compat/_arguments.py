"""Errors about arguments, by the names that the caller of `jax_ep.compat` knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import jax
import jax.numpy as jnp

from jax_ep._checks import expect, expect_array, expect_int
from jax_ep.types import CapacityError, DispatchLayout, ExpertIdError

# What a communicator calls an argument, and what its caller does.
_OF_ALL = {"hidden_size": "x.shape[1]", "dtype": "x.dtype"}
_OF_IDS = _OF_ALL | {"topk": "topk_idx.shape[1]", "topk_ids": "topk_idx", "weights": "topk_weights"}
NAMES = {
    DispatchLayout.RANK_MAJOR: _OF_IDS
    | {
        "num_experts": "num_tokens_per_expert.shape[0]",
        "max_recv_tokens_per_rank": "num_worst_tokens",
        "quant": "x[0]",
        "quant.dtype": "x[0].dtype",
        "quant.block_size": "x[1]",
        "quant.scales": "x[1]",
        "quant.scale_dtype": "x[1].dtype",
    },
    DispatchLayout.EXPERT_MAJOR: _OF_IDS | {"max_tokens_per_rank": "num_max_dispatch_tokens_per_rank"},
    DispatchLayout.FLAT: _OF_ALL
    | {
        "topk_ids": "routing_map, topk_idx",
        "max_recv_tokens_per_rank": "num_permuted_tokens",
        "expert_alignment": "pad_multiple",
        "y": "x",
    },
}

_RENAMED = (ValueError, TypeError, CapacityError, ExpertIdError)
# An advice for what has no such argument.
_NOT_HERE = ', or choose overflow="drop"'


@contextlib.contextmanager
def named(names: dict[str, str]) -> Iterator[None]:
    """Errors inside that begin with one of `names` begin with what stands for it."""
    try:
        yield
    except _RENAMED as error:
        name, _, what = str(error).partition(": ")
        if type(error) not in _RENAMED or name not in names:
            raise
        raise type(error)(f"{names[name]}: {what.replace(_NOT_HERE, '')}") from error


def refuse(what: str, why: str) -> NoReturn:
    raise NotImplementedError(f"{what}: not in jax_ep: {why}")


def resolve_group(group) -> tuple[jax.sharding.Mesh, str]:
    """What stands for a process group: a mesh and the name of its axis."""
    mesh, axis_name = group if isinstance(group, tuple) and len(group) == 2 else (group, "ep")
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"group: expected a jax.sharding.Mesh, or one and an axis name, got {type(mesh).__name__}")
    expect(axis_name in mesh.axis_names, "group", f"an axis of the mesh, one of {mesh.axis_names}", repr(axis_name))
    return mesh, axis_name


def expect_matrix(argument: str, value, shape: tuple[int | str, ...] = ("T", "H")) -> None:
    """Of any dtype."""
    expect_array(argument, value, shape, getattr(value, "dtype", jnp.float32))


def expect_count(argument: str, value, minimum: int = 1) -> None:
    """An int, or None for one that was not given."""
    if value is not None:
        expect_int(argument, value, minimum)
