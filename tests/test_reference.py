"""The reference against loops over rows in numpy, and against finite differences."""

import dataclasses
import functools
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import suite
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from suite import FLAT, RANK_MAJOR, Case, Inputs


class Row(NamedTuple):
    token: int  # among all ranks' tokens
    ks: list[int]  # of the token's experts, those that the row is for


PADDING = Row(-1, [])


def rows_by_expert(topk_ids: np.ndarray, experts: range, alignment: int) -> tuple[list[Row], list[int]]:
    """The rows of FLAT in order of (expert, source, token, k), and where each expert's begin and the last one's end."""
    rows: list[Row] = []
    offsets = [0]
    for expert in experts:
        rows += [Row(token, [k]) for token, k in np.argwhere(topk_ids == expert)]
        rows += [PADDING] * (-len(rows) % alignment)
        offsets.append(len(rows))
    return rows, offsets


def rows_by_source(topk_ids: np.ndarray, experts: range, num_ranks: int) -> tuple[list[Row], list[int]]:
    """The rows of RANK_MAJOR in order of (source, token)."""
    is_mine = np.isin(topk_ids, experts)
    rows: list[Row] = []
    offsets = [0]
    for tokens in np.split(np.arange(len(topk_ids)), num_ranks):
        rows += [Row(token, np.flatnonzero(is_mine[token])) for token in tokens if is_mine[token].any()]
        offsets.append(len(rows))
    return rows, offsets


class Received(NamedTuple):
    """What the oracle says of one rank, and which (token, k) it kept."""

    tokens: np.ndarray
    num_tokens_per_expert: np.ndarray
    offsets: np.ndarray
    num_dropped: int
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    y_gradient: np.ndarray
    kept: np.ndarray


def receive(case: Case, inputs: Inputs, rank: int, capacity: int) -> Received:
    num_local = case.num_experts // case.num_ranks
    experts = range(rank * num_local, (rank + 1) * num_local)
    if case.layout is FLAT:
        rows, offsets = rows_by_expert(inputs.topk_ids, experts, case.expert_alignment)
    else:
        rows, offsets = rows_by_source(inputs.topk_ids, experts, case.num_ranks)
    tokens = np.zeros((capacity, case.hidden_size), inputs.x.dtype)
    topk_ids = np.full((capacity, case.topk), -1)
    topk_weights = np.zeros((capacity, case.topk), np.float32)
    y_gradient = np.zeros((capacity, case.hidden_size))
    kept = np.zeros(inputs.topk_ids.shape, bool)
    for i, (token, ks) in enumerate(rows[:capacity]):
        if token < 0:
            continue
        tokens[i] = inputs.x[token]
        topk_ids[i, ks] = inputs.topk_ids[token, ks] - experts[0]
        topk_weights[i, ks] = inputs.weights[token, ks]
        is_weighted = case.layout is FLAT and case.weighted
        y_gradient[i] = inputs.gradient[token] * (inputs.weights[token, ks] if is_weighted else 1.0)
        kept[token, ks] = True
    return Received(
        tokens,
        np.array([(inputs.topk_ids[kept] == expert).sum() for expert in experts]),
        np.minimum(offsets, capacity),
        sum(row is not PADDING for row in rows[capacity:]),
        topk_ids,
        topk_weights,
        y_gradient,
        kept,
    )


def shards(array: jax.Array, num_ranks: int) -> list[np.ndarray]:
    return np.split(np.asarray(array), num_ranks)


def check_received(case: Case, want: list[Received], got: suite.Result) -> None:
    out = got.received
    pairs = [
        (out.tokens, "tokens"),
        (out.layout.num_tokens_per_expert, "num_tokens_per_expert"),
        (out.layout.offsets, "offsets"),
        (out.num_dropped, "num_dropped"),
    ]
    if case.layout is RANK_MAJOR:
        pairs += [(out.topk_ids, "topk_ids")] + [(out.topk_weights, "topk_weights")] * case.weighted
    for array, name in pairs:
        for rank, part in enumerate(shards(array, case.num_ranks)):
            np.testing.assert_array_equal(part.squeeze(), np.squeeze(getattr(want[rank], name)), err_msg=name)


def check_reference(case: Case) -> None:
    inputs = suite.draw(case)
    (got,) = suite.run("reference", suite.make_mesh("reference", case.num_ranks), case)
    capacity = got.received.tokens.shape[0] // case.num_ranks
    want = [receive(case, inputs, rank, capacity) for rank in range(case.num_ranks)]
    check_received(case, want, got)
    kept = np.any([received.kept for received in want], axis=0)
    suite.assert_dense(case, inputs._replace(topk_ids=np.where(kept, inputs.topk_ids, -1)), got)
    y_gradient = np.concatenate([received.y_gradient for received in want])
    suite.assert_rounded("gradient of the expert output", case.dtype, got.gradients[-1], y_gradient)


@st.composite
def cases(draw) -> Case:
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 8]))
    capacity = draw(st.one_of(st.none(), st.integers(1, 60)))
    return Case(
        num_ranks=num_ranks,
        num_tokens=draw(st.integers(0, 30)),
        hidden_size=draw(st.integers(1, 5)),
        topk=draw(st.integers(1, 6)),
        num_experts=num_ranks * draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        layout=draw(st.sampled_from([FLAT, RANK_MAJOR])),
        routing=draw(st.sampled_from(["uniform", "skewed", "single", "empty"])),
        weighted=draw(st.booleans()),
        expert_alignment=draw(st.sampled_from([1, 3, 8])),
        capacity=capacity,
        overflow="error" if capacity is None else "drop",
        seed=draw(st.integers(0, 1000)),
    )


@hypothesis.given(case=cases())
def test_random_cases(case):
    check_reference(case)


def test_the_order_of_rows_in_words():
    """Two ranks, two experts each; the oracle itself, on an example worked out by hand."""
    case = Case(num_ranks=2, num_tokens=2, hidden_size=1, topk=2, num_experts=4, expert_alignment=2)
    topk_ids = np.array([[1, 0], [1, 1], [-1, 1], [3, 0]])  # two tokens of rank 0, two of rank 1
    inputs = suite.draw(case)._replace(x=np.arange(10.0, 50.0, 10.0)[:, None], topk_ids=topk_ids)
    received = receive(case, inputs, rank=0, capacity=7)
    assert received.tokens[:, 0].tolist() == [10, 40, 10, 20, 20, 30, 0]
    assert received.offsets.tolist() == [0, 2, 6]
    assert received.num_tokens_per_expert.tolist() == [2, 4]
    received = receive(dataclasses.replace(case, layout=RANK_MAJOR), inputs, rank=0, capacity=3)
    assert received.tokens[:, 0].tolist() == [10, 20, 30]
    assert received.topk_ids.tolist() == [[1, 0], [1, 1], [-1, 1]]
    assert received.offsets.tolist() == [0, 2, 3]
    assert received.num_dropped == 1


@pytest.mark.parametrize("layout", [FLAT, RANK_MAJOR], ids=lambda layout: layout.value)
def test_derivatives_of_a_nonlinear_layer(layout):
    case = Case(num_ranks=2, num_tokens=3, hidden_size=2, num_experts=4, dtype="float64", layout=layout)
    mesh = suite.make_mesh("reference", 2, axis_type=AxisType.Auto)
    inputs = suite.draw(case)
    with jax.enable_x64(True), suite.communicator("reference", mesh, case) as comm:

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=(P("ep"), P("ep"), P("ep"), P("ep")), out_specs=P("ep"))
        def layer(topk_ids, weights, x, scale):
            out, handle = comm.dispatch(x, topk_ids, weights)
            out = dataclasses.replace(out, tokens=jnp.tanh(out.tokens))
            return jnp.tanh(comm.combine(suite.apply_experts(out, scale), handle))

        f = functools.partial(layer, inputs.topk_ids, inputs.weights)
        jax.test_util.check_grads(f, (inputs.x, inputs.scale), order=2, modes=["rev"])
