"""Steady-state time of an op: many calls chained inside one jitted program, repeated."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_ep import _ffi

# Calls in one program: more would take long to compile, fewer would not hide the time to start it.
_MAX_CALLS = 32


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half of what the fastest and the slowest repeat lie apart, relative to the median."""
        return (max(self.samples) - min(self.samples)) / 2 / self.median


def _zero_from(out) -> jax.Array:
    """An int32 zero that XLA cannot know to be one: it compares an element of each float array with itself."""
    zero = jnp.int32(0)
    for leaf in jax.tree.leaves(out):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size:
            first = leaf[(slice(0, 1),) * leaf.ndim].reshape(())
            zero += (first != first).astype(jnp.int32)
    return zero


def _chained(op: Callable, num_calls: int) -> Callable:
    """`op(touched, *rest)`, called so that every array in `touched` depends on the call before: calls can be
    neither merged nor reordered. One element of each is rewritten, in place. The barrier keeps XLA from computing
    only those elements of a result that are looked at. No loop: XLA would copy what it carries."""

    def program(touched, *rest):
        for _ in range(num_calls):
            zero = _zero_from(jax.lax.optimization_barrier(op(touched, *rest)))
            touched = jax.tree.map(lambda a, zero=zero: a.at[(0,) * a.ndim].add(zero.astype(a.dtype)), touched)
        return touched

    return program


def measure(
    op: Callable, mesh: Mesh, args, *, axis_name: str, seconds_per_run: float = 0.03, repeats: int = 5
) -> Times:
    """Times `op(*args)`, mapped over `axis_name`; its first argument holds the arrays that change from call to
    call, see `_chained`."""
    spec = PartitionSpec(axis_name)
    touched, *rest = jax.tree.map(jnp.copy, args)

    def program(num_calls: int):
        def vary_all(*args):
            return _chained(op, num_calls)(*jax.tree.map(lambda a: _ffi.vary(a, {axis_name}), args))

        return jax.jit(jax.shard_map(vary_all, mesh=mesh, in_specs=spec, out_specs=spec), donate_argnums=0)

    def seconds(run) -> float:
        nonlocal touched
        start = time.perf_counter()
        touched = jax.block_until_ready(run(touched, *rest))
        return time.perf_counter() - start

    run, num_calls = program(1), 1
    seconds(run)
    per_call = seconds(run)
    if per_call < seconds_per_run:
        per_call = min(seconds(run) for _ in range(3))
        num_calls = max(1, min(_MAX_CALLS, round(seconds_per_run / per_call)))
        run = program(num_calls)
        seconds(run)
    return Times(tuple(seconds(run) / num_calls for _ in range(repeats)))
