"""Many rounds of dispatch and combine with routing that changes from round to round, each checked on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jax_ep import DispatchLayout, DispatchOutput, MoECommunicator
from jax_ep.bench.layer import rows_of_slots
from jax_ep.bench.problem import Problem, on_host
from jax_ep.bench.results import StressResult
from jax_ep.bench.timing import AXIS
from jax_ep.bench.workloads import Workload

_ROUNDS_PER_PROGRAM = 50
# Roundings of bfloat16 that a sum of one token's rows may be off.
_TOLERANCE = 2.0**-5
_MIX = 0x9E3779B1
_SHARE_OF_IDLE_RANKS = 1 / 8


class Round(NamedTuple):
    """One rank's share of a round."""

    x: jax.Array
    topk_ids: jax.Array
    weights: jax.Array


def run_stress(workload: Workload, mesh: Mesh, num_rounds: int) -> Iterator[StressResult]:
    """After each program, what has been found so far."""
    # The worst case of capacity, so that no round loses rows.
    with Problem(workload, mesh, max_recv_tokens_per_rank=None) as problem:
        step = _program(problem.comm, workload, mesh)
        wrong_sums = wrong_rows = done = 0
        on_host(step(0, 1)[0])  # compiles
        start = time.perf_counter()
        while done < num_rounds:
            stop = min(num_rounds, done + _ROUNDS_PER_PROGRAM)
            sums, rows = step(done, stop)
            wrong_sums, wrong_rows, done = wrong_sums + int(on_host(sums)), wrong_rows + int(on_host(rows)), stop
            problem.comm.check()
            yield StressResult(done, wrong_sums, wrong_rows, done / (time.perf_counter() - start))


def _program(comm: MoECommunicator, workload: Workload, mesh: Mesh):
    """(first round, behind the last) -> rounds with wrong sums, rounds with wrong rows."""

    def one_round(index, counts):
        drawn = _draw(workload, index)
        out, handle = comm.dispatch(drawn.x, drawn.topk_ids, drawn.weights)
        wrong_sums = _num_wrong_sums(comm.combine(out.tokens, handle), drawn)
        difference = _received_checksum(comm, out) - _sent_checksum(drawn)
        sums = (lax.psum(wrong_sums, AXIS) > 0).astype(jnp.int32)
        rows = (lax.psum(difference, AXIS) != 0).astype(jnp.int32)
        return counts[0] + sums, counts[1] + rows

    def rounds(first, stop):
        return lax.fori_loop(first, stop, one_round, (jnp.int32(0), jnp.int32(0)))

    nothing = PartitionSpec()
    return jax.jit(jax.shard_map(rounds, mesh=mesh, in_specs=nothing, out_specs=nothing))


def _draw(workload: Workload, index) -> Round:
    """Random tokens, of which a random part has no experts, and experts from a random part of all, some unused.

    Some ranks have no token at all. In low-latency mode a token names an expert once: a slot each is what there is.
    """
    everywhere = jax.random.fold_in(jax.random.key(0), index)
    mine = jax.random.fold_in(everywhere, lax.axis_index(AXIS))
    keys = jax.random.split(mine, 7)
    shape = (workload.num_tokens, workload.topk)
    num_hot = jax.random.randint(everywhere, (), 1, workload.num_experts + 1)
    if workload.low_latency:
        topk_ids = _distinct(keys[0], workload, num_hot)
    else:
        topk_ids = jax.random.randint(keys[0], shape, 0, workload.num_experts) % num_hot
    unused = jax.random.uniform(keys[1], shape) < jax.random.uniform(keys[2], ())
    num_live = jax.random.randint(keys[3], (), 0, workload.num_tokens + 1)
    num_live = jnp.where(jax.random.uniform(keys[6]) < _SHARE_OF_IDLE_RANKS, 0, num_live)
    dead = jnp.arange(workload.num_tokens)[:, None] >= num_live
    return Round(
        x=jax.random.normal(keys[4], (workload.num_tokens, workload.hidden_size), jnp.bfloat16),
        topk_ids=jnp.where(unused | dead, -1, topk_ids).astype(jnp.int32),
        weights=jax.random.uniform(keys[5], shape, jnp.float32),
    )


def _distinct(key, workload: Workload, num_hot):
    """Experts below `num_hot`, none twice for a token; -1 where there are not enough of them."""
    all_experts = jnp.arange(workload.num_experts, dtype=jnp.int32)
    draws = jax.random.uniform(key, (workload.num_tokens, workload.num_experts))
    topk_ids = lax.top_k(jnp.where(all_experts < num_hot, draws, -1), workload.topk)[1].astype(jnp.int32)
    return jnp.where(topk_ids < num_hot, topk_ids, -1)


def _num_wrong_sums(got, drawn: Round):
    """Experts return what they get, so each token is to come back times the sum of its weights."""
    total = jnp.sum(jnp.where(drawn.topk_ids >= 0, drawn.weights, 0), axis=1, keepdims=True)
    want = drawn.x.astype(jnp.float32) * total
    close = jnp.abs(got.astype(jnp.float32) - want) <= _TOLERANCE * jnp.abs(want)
    return jnp.sum(~close, dtype=jnp.int32)  # a NaN is not close


def _sent_checksum(drawn: Round):
    each = _hash(drawn.x)[:, None] * _expert_factor(drawn.topk_ids)
    return jnp.sum(jnp.where(drawn.topk_ids >= 0, each, 0), dtype=jnp.uint32)


def _received_checksum(comm: MoECommunicator, out: DispatchOutput):
    """Rows of the wrong expert change it; those without a token are zero, and add nothing."""
    tokens, counts = out.tokens, out.layout.num_tokens_per_expert
    if out.layout.kind is DispatchLayout.EXPERT_MAJOR:
        # Of its many slots, no more can hold a token than there are (token, k).
        tokens = rows_of_slots(tokens, counts, comm.num_ranks * comm.config.max_tokens_per_rank * comm.config.topk)
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    local = jnp.searchsorted(jnp.cumsum(counts), row, side="right", method="compare_all").astype(jnp.int32)
    expert = lax.axis_index(AXIS) * comm.num_local_experts + local
    return jnp.sum(_hash(tokens) * _expert_factor(expert), dtype=jnp.uint32)


def _hash(rows):
    """uint32 of each row of bfloat16."""
    bits = lax.bitcast_convert_type(rows, jnp.uint16).astype(jnp.uint32)
    factors = (2 * jnp.arange(rows.shape[1], dtype=jnp.uint32) + 1) * jnp.uint32(_MIX)
    return jnp.sum(bits * factors, axis=1, dtype=jnp.uint32)


def _expert_factor(ids):
    return (2 * ids + 1).astype(jnp.uint32) * jnp.uint32(_MIX)
