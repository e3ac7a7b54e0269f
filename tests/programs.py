"""Checks of larger programs: layers in a scan, and many independent calls in flight among native collectives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import suite
from jax import lax
from jax.sharding import PartitionSpec as P
from suite import FLAT, RANK_MAJOR, Case

TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def assert_close(got, want) -> None:
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        for (index, a), (_, b) in zip(suite.local(got_leaf), suite.local(want_leaf), strict=True):
            np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=f"{got_leaf.shape} at {index}")


def scan_layers(implementation: str, mesh, case: Case, num_layers: int):
    """The output of `num_layers` rematerialised layers in a scan, and its gradients."""
    tokens = P(mesh.axis_names)
    per_layer = P(None, mesh.axis_names)
    rng = np.random.default_rng(case.seed)
    num_tokens = mesh.size * case.num_tokens
    x = suite.put(rng.standard_normal((num_tokens, case.hidden_size), np.float32), mesh, tokens)
    gradient = suite.put(rng.standard_normal(x.shape, np.float32), mesh, tokens)
    scale = rng.standard_normal((num_layers, case.num_experts, case.hidden_size), np.float32)
    weights = rng.random((num_layers, num_tokens, case.topk), np.float32)
    topk_ids = suite.draw_topk_ids(rng, case, num_layers * num_tokens).reshape(weights.shape)
    layers = (
        suite.put(scale, mesh, P(None, "ep")),
        suite.put(weights, mesh, per_layer),
        suite.put(topk_ids, mesh, per_layer),
    )
    with suite.communicator(implementation, mesh, case) as comm:

        @jax.checkpoint
        def layer(x, arrays):
            scale, weights, topk_ids = arrays
            combined, _ = suite.moe(comm, x, topk_ids, weights, scale)
            return jnp.tanh(x + combined), None

        @jax.shard_map(
            mesh=mesh,
            in_specs=(tokens, P(None, "ep"), per_layer, per_layer),
            out_specs=tokens,
            check_vma=case.check_vma,
        )
        def model(x, *layers):
            return lax.scan(layer, x, layers)[0]

        @jax.jit
        def step(x, scale, weights, topk_ids, gradient):
            out, pull = jax.vjp(lambda x, scale, weights: model(x, scale, weights, topk_ids), x, scale, weights)
            return out, pull(gradient)

        return jax.block_until_ready(step(x, *layers, gradient))


def check_scan(implementation: str, mesh, case: Case, num_layers: int = 3) -> None:
    got = scan_layers(implementation, mesh, case, num_layers)
    assert_close(got, scan_layers("reference", mesh, case, num_layers))


def many_branches(mesh, num_branches: int, move):
    """A program of independent branches, every other one a native collective, the rest `move(branch, h, ids, weights)`
    to the experts and back; and its gradients."""
    tokens = P(mesh.axis_names)
    # By default GPUs round float32 to TF32, and how it shows depends on the kernel chosen for each program.
    matmul = functools.partial(jnp.matmul, precision="highest")

    def branch(i, x, matrix, topk_ids, weights):
        h = jnp.tanh(matmul(x, matrix))
        match i % 4:
            case 1:
                h = lax.pcast(lax.psum(h, "ep"), "ep", to="varying")
            case 3:
                h = lax.all_to_all(h, "ep", split_axis=0, concat_axis=0, tiled=True)
            case _:
                h = move(i, h, topk_ids, weights)
        return matmul(h, matrix.T)

    @jax.shard_map(mesh=mesh, in_specs=(tokens, P(), P(None, mesh.axis_names), tokens), out_specs=tokens)
    def program(x, matrices, topk_ids, weights):
        return sum(branch(i, x, matrices[i], topk_ids[i], weights) for i in range(num_branches))

    @jax.jit
    def step(x, matrices, topk_ids, weights, gradient):
        out, pull = jax.vjp(lambda x, m, w: program(x, m, topk_ids, w), x, matrices, weights)
        return out, pull(gradient)

    return step


def check_many_branches(implementation: str, mesh, num_branches: int = 24, times: int = 5) -> None:
    """Independent calls of two communicators in one program, which devices may reach in different orders."""
    num_ranks = mesh.shape["ep"]
    case = Case(num_ranks, num_tokens=2 * num_ranks, hidden_size=32, topk=3, num_experts=24)
    inputs = suite.draw(case, mesh.size // num_ranks)
    rng = np.random.default_rng(0)
    topk_ids = suite.draw_topk_ids(rng, case, num_branches * len(inputs.x)).reshape(num_branches, -1, case.topk)
    matrices = rng.standard_normal((num_branches, case.hidden_size, case.hidden_size), np.float32) / 8
    tokens = P(mesh.axis_names)
    specs = (tokens, P(), P(None, mesh.axis_names), tokens, tokens)
    arrays = (inputs.x, matrices, topk_ids, inputs.weights, inputs.gradient)
    arguments = [suite.put(array, mesh, spec) for array, spec in zip(arrays, specs, strict=True)]

    def directly(_, h, topk_ids, weights):
        return h * jnp.where(topk_ids >= 0, weights, 0).sum(1, keepdims=True)

    def by_experts_that_return_what_they_get(i, h, topk_ids, weights):
        comm = flat if i % 4 else rank_major
        out, handle = comm.dispatch(h, topk_ids, weights)
        return comm.combine(suite.apply_experts(out, jnp.ones((comm.num_local_experts, case.hidden_size))), handle)

    want = many_branches(mesh, num_branches, directly)(*arguments)
    with (
        suite.communicator(implementation, mesh, case, output_layout=FLAT) as flat,
        suite.communicator(implementation, mesh, case, output_layout=RANK_MAJOR) as rank_major,
    ):
        step = many_branches(mesh, num_branches, by_experts_that_return_what_they_get)
        for _ in range(times):
            assert_close(jax.block_until_ready(step(*arguments)), want)
