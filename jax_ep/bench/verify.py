"""Are results right? Asked before they are timed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep.bench.ops import Layer
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
    epsilon = float(jnp.finfo(jnp.bfloat16 if want.dtype == jnp.float32 else want.dtype).eps)

    def count(got, want):
        if roundings == 0:
            return jnp.sum(got != want)
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        return jnp.sum(~(jnp.abs(got - want) <= roundings * epsilon * jnp.abs(want) + 1e-30))

    replicated = NamedSharding(got.sharding.mesh, PartitionSpec())
    return int(on_host(jax.jit(count, out_shardings=replicated)(got, want)))


class Expected:
    """What the ops should give for a problem's arrays: rows by the reference, gradients by our ops."""

    def __init__(self, problem: Problem):
        ids_and_weights, x = (problem.topk_ids, problem.weights), problem.x
        reference = problem.communicator(implementation="reference")
        self.tokens, self.row_weights = problem.map(Layer(reference).fresh, ids_and_weights, x)
        self.out = problem.map(Layer(reference).forward, ids_and_weights, x)
        reference.destroy()
        layer = Layer(problem.comm)
        tokens, row_weights = problem.map(layer.fresh, ids_and_weights, x)
        expect_equal("dispatch", (tokens, row_weights), (self.tokens, self.row_weights))
        out, self.gradients = problem.map(layer.forward_and_backward, ids_and_weights, x, x)
        expect_close("forward", out, self.out)
        problem.comm.check()
