"""Are results right? Asked before they are timed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep import MoEMode
from jax_ep.bench.layer import Layer, Received
from jax_ep.bench.problem import Problem, on_host

# Experts return what they get and weights are positive, so the terms of every sum have one sign: what an
# implementation rounds differently stays within some roundings of the result.
_ROUNDINGS = 8


class WrongResult(RuntimeError):
    """An implementation's output is not what it should be."""


def expect_close(what: str, got, want) -> None:
    _expect(what, got, want, _ROUNDINGS)


def expect_equal(what: str, got, want) -> None:
    _expect(what, got, want, 0)


def _expect(what: str, got, want, roundings: int) -> None:
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        count = num_different(got_leaf, want_leaf, roundings)
        if count:
            raise WrongResult(f"{what}: {count} of {want_leaf.size} elements are wrong")


def num_different(got, want, roundings: int = 0) -> int:
    """Elements that lie more than some roundings of the coarser dtype apart; a NaN is different from everything."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return want.size

    def count(got, want):
        if roundings == 0:
            return jnp.sum(got != want)
        epsilon = float(jnp.finfo(jnp.bfloat16 if want.dtype == jnp.float32 else want.dtype).eps)
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        return jnp.sum(~(jnp.abs(got - want) <= roundings * epsilon * jnp.abs(want) + 1e-30))

    replicated = NamedSharding(got.sharding.mesh, PartitionSpec())
    return int(on_host(jax.jit(count, out_shardings=replicated)(got, want)))


class Expected:
    """What the ops should give for a problem's arrays: by the reference in high-throughput mode, rows as FLAT has them.

    Each part is computed when it is first asked for.
    """

    def __init__(self, problem: Problem):
        self._problem = problem

    def _by_reference(self, method: Callable):
        problem = self._problem
        with problem.communicator(implementation="reference", mode=MoEMode.HIGH_THROUGHPUT) as reference:
            ids_and_weights = (problem.topk_ids, problem.weights)
            return problem.map(functools.partial(method, Layer(reference)), ids_and_weights, problem.x)

    @functools.cached_property
    def received(self) -> Received:
        return self._by_reference(Layer.fresh)

    @functools.cached_property
    def quantized(self) -> Received:
        return self._by_reference(Layer.quantized)

    @functools.cached_property
    def sums(self) -> jax.Array:
        return self._by_reference(Layer.forward)

    @functools.cached_property
    def gradients(self):
        """By our ops, whose sums are checked first."""
        problem = self._problem
        forward_and_backward = Layer(problem.comm).forward_and_backward
        sums, gradients = problem.map(forward_and_backward, (problem.topk_ids, problem.weights), problem.x, problem.x)
        self.check_sums(sums)
        problem.comm.check()
        return gradients

    def check_received(self, got: Received) -> None:
        expect_equal("dispatch", self._as_flat(got), self.received)

    def check_quantized(self, got: Received) -> None:
        expect_equal("dispatch", self._as_flat(got), self.quantized)

    def check_rows(self, got: tuple[jax.Array, jax.Array]) -> None:
        expect_equal("dispatch", got, (self.received.tokens, self.received.row_weights))

    def check_sums(self, got: jax.Array) -> None:
        """Of all tokens, or of the first of each rank."""
        each = got.shape[0] // self._problem.num_ranks
        expect_close("combine", got, self._problem.map(lambda sums: sums[:each], self.sums))

    def _as_flat(self, got: Received) -> Received:
        if got.tokens.ndim == 2:
            return got
        return self._problem.map(functools.partial(Received.flat, capacity=self._problem.capacity), got)
