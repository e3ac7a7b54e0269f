"""Steady-state time of an op: many calls chained inside one jitted program, repeated."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_ep import _ffi


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
    neither merged nor moved out of the loop. One element of each is rewritten, in place. The loop carries all
    results, or XLA would compute only the elements that are looked at."""

    def program(touched, *rest):
        def body(_, carry):
            touched, _ = carry
            out = op(touched, *rest)
            zero = _zero_from(out)
            return jax.tree.map(lambda a: a.at[(0,) * a.ndim].add(zero.astype(a.dtype)), touched), out

        shapes = jax.eval_shape(op, touched, *rest)
        start = jax.tree.map(lambda s: _ffi.vary(jnp.zeros(s.shape, s.dtype), s.manual_axis_type.varying), shapes)
        return jax.lax.fori_loop(0, num_calls, body, (touched, start), unroll=math.gcd(num_calls, 8))

    return program


def measure(op: Callable, mesh: Mesh, args, *, axis_name: str, min_seconds: float = 0.05, repeats: int = 7) -> Times:
    """Times `op(*args)`, mapped over `axis_name`; its first argument holds the arrays that change from call to
    call, see `_chained`."""
    spec = PartitionSpec(axis_name)

    def program(num_calls: int):
        def vary_all(*args):
            return _chained(op, num_calls)(*jax.tree.map(lambda a: _ffi.vary(a, {axis_name}), args))

        return jax.jit(jax.shard_map(vary_all, mesh=mesh, in_specs=spec, out_specs=spec))

    def seconds(run) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        return time.perf_counter() - start

    once = program(2)
    seconds(once)
    per_call = min(seconds(once) for _ in range(2)) / 2
    num_calls = max(2, min(1000, round(min_seconds / per_call / 8) * 8))
    run = program(num_calls)
    seconds(run)
    return Times(tuple(seconds(run) / num_calls for _ in range(repeats)))
