"""The reference against loops over rows in numpy, and against finite differences."""

import dataclasses
import functools
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import programs
import pytest
import suite
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from suite import EXPERT_MAJOR, FLAT, RANK_MAJOR, Case, Inputs

import jax_ep
from jax_ep import QuantConfig, _quant


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


def rows_in_slots(topk_ids: np.ndarray, experts: range, num_slots: int) -> tuple[list[Row], list[int], int]:
    """The rows of EXPERT_MAJOR: those of FLAT, each expert's in slots of its own; and how many found none."""
    rows: list[Row] = []
    num_dropped = 0
    for expert in experts:
        mine, _ = rows_by_expert(topk_ids, range(expert, expert + 1), 1)
        num_dropped += max(0, len(mine) - num_slots)
        rows += (mine + [PADDING] * num_slots)[:num_slots]
    return rows, [num_slots * i for i in range(len(experts) + 1)], num_dropped


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
    num_dropped = 0
    if case.layout is FLAT:
        rows, offsets = rows_by_expert(inputs.topk_ids, experts, case.expert_alignment)
    elif case.layout is EXPERT_MAJOR:
        rows, offsets, num_dropped = rows_in_slots(inputs.topk_ids, experts, capacity // num_local)
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
        is_weighted = case.layout is not RANK_MAJOR and case.weighted
        y_gradient[i] = inputs.gradient[token] * (inputs.weights[token, ks] if is_weighted else 1.0)
        kept[token, ks] = True
    return Received(
        tokens,
        np.array([(inputs.topk_ids[kept] == expert).sum() for expert in experts]),
        np.minimum(offsets, capacity),
        num_dropped + sum(row is not PADDING for row in rows[capacity:]),
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
            wanted = np.asarray(getattr(want[rank], name))
            np.testing.assert_array_equal(part.reshape(wanted.shape), wanted, err_msg=name)


def check_reference(case: Case) -> None:
    inputs = suite.draw(case)
    (got,) = suite.run("reference", suite.make_mesh("reference", case.num_ranks), case)
    capacity = got.received.tokens[..., 0].size // case.num_ranks
    want = [receive(case, inputs, rank, capacity) for rank in range(case.num_ranks)]
    check_received(case, want, got)
    kept = np.any([received.kept for received in want], axis=0)
    suite.assert_dense(case, inputs._replace(topk_ids=np.where(kept, inputs.topk_ids, -1)), got)
    y_gradient = np.concatenate([received.y_gradient for received in want])
    suite.assert_rounded("gradient of the expert output", case.dtype, got.gradients[-1], y_gradient)


@st.composite
def cases(draw) -> Case:
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 8]))
    mode, layout = draw(st.sampled_from(suite.ARRANGEMENTS))
    has_slots = layout is EXPERT_MAJOR
    capacity = None if has_slots else draw(st.one_of(st.none(), st.integers(1, 60)))
    drops = draw(st.booleans()) if has_slots else capacity is not None
    return Case(
        num_ranks=num_ranks,
        num_tokens=draw(st.integers(0, 30)),
        hidden_size=draw(st.integers(1, 5)),
        topk=draw(st.integers(1, 6)),
        num_experts=num_ranks * draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        mode=mode,
        layout=layout,
        routing=draw(st.sampled_from(["uniform", "skewed", "single", "empty"])),
        weighted=draw(st.booleans()),
        expert_alignment=draw(st.sampled_from([1, 3, 8])) if layout is FLAT else 1,
        capacity=capacity,
        overflow="drop" if drops else "error",
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
    received = receive(dataclasses.replace(case, layout=EXPERT_MAJOR), inputs, rank=0, capacity=6)
    assert received.tokens[:, 0].tolist() == [10, 40, 0, 10, 20, 20]
    assert received.offsets.tolist() == [0, 3, 6]
    assert received.num_tokens_per_expert.tolist() == [2, 3]
    assert received.num_dropped == 1


@pytest.mark.parametrize("mode, layout", suite.ARRANGEMENTS[2:], ids=suite.arrangement_id)
def test_derivatives_of_a_nonlinear_layer(mode, layout):
    case = Case(num_ranks=2, num_tokens=3, hidden_size=2, num_experts=4, dtype="float64", mode=mode, layout=layout)
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


# What a quantised row is: `_quant.quantize` against its definition in numpy.


def quantised(x: np.ndarray, quant: QuantConfig) -> tuple[np.ndarray, np.ndarray]:
    """`x` [N, H] block by block, in IEEE float32 without flushing."""
    dtype = np.dtype(quant.dtype)
    qmax = np.float32({"float8_e4m3fn": 448, "float8_e5m2": 57344, "int8": 127}[dtype.name])
    blocks = x.astype(np.float32).reshape(len(x), -1, quant.block_size)
    amax = np.maximum(np.abs(blocks).max(-1), np.float32(2.0**-90))
    if np.dtype(quant.scale_dtype) == np.float32:
        scales = amax * (np.float32(1) / qmax)
        inverse = np.float32(1) / scales
    else:
        exponents = np.frexp(amax)[1] - np.frexp(qmax)[1]
        scales = np.where(np.isfinite(amax), np.ldexp(np.float32(1), exponents), np.float32(np.nan))
        inverse = 1 / scales
    elements = np.clip(blocks * inverse[..., None], -qmax, qmax)
    if dtype == np.int8:
        elements = np.where(np.isnan(elements), 0, np.rint(elements))
    return elements.astype(dtype).reshape(x.shape), scales.astype(quant.scale_dtype)


def every_number_by_magnitude(dtype) -> np.ndarray:
    """All numbers of a 16-bit type, and NaN, in rows of neighbours."""
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    return numbers[np.argsort(np.abs(numbers.astype(np.float32)), kind="stable")].reshape(-1, 128)


def near_ties(quant: QuantConfig) -> np.ndarray:
    """Blocks of any magnitude that lead with qmax, so that elements then are what is halfway between two numbers of the
    type, or as little as float32 can be off that."""
    dtype = np.dtype(quant.dtype)
    numbers = np.arange(2**8, dtype=np.uint8).view(dtype).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    halfway = (numbers[1:] + numbers[:-1]) / 2
    values = np.concatenate([numbers, halfway, *(np.nextafter(halfway, np.float32(to)) for to in (-np.inf, np.inf))])
    values.resize(-(-values.size // 31), 31)
    blocks = np.concatenate([np.full((len(values), 1), _quant.QMAX[dtype.name], np.float32), values], axis=1)
    with np.errstate(over="ignore"):
        scaled = [np.ldexp(blocks, exponent) for exponent in range(-149, 128, 3)]
    return np.concatenate(scaled).reshape(-1, 32)


def assert_quantised(x: np.ndarray, quant: QuantConfig) -> None:
    with np.errstate(all="ignore"):
        want = quantised(x, quant)
    got = jax.jit(functools.partial(_quant.quantize, quant=quant))(x)
    for name, got_array, want_array in zip(("elements", "scales"), map(np.asarray, got), want, strict=True):
        assert (got_array.shape, got_array.dtype) == (want_array.shape, want_array.dtype)
        np.testing.assert_array_equal(suite.bits(got_array), suite.bits(want_array), err_msg=name)


def quant_id(quant: QuantConfig) -> str:
    return f"{quant.dtype}-{quant.scale_dtype}"


@pytest.mark.parametrize("quant", suite.QUANTS, ids=quant_id)
def test_quantize_is_its_definition(quant):
    for dtype in (jnp.bfloat16, jnp.float16):
        assert_quantised(every_number_by_magnitude(dtype), quant)
    assert_quantised(near_ties(quant), dataclasses.replace(quant, block_size=32))
    rng = np.random.default_rng(0)
    for dtype in (np.float32, jnp.bfloat16):
        assert_quantised(suite.draw_magnitudes(rng, (1000, 128), dtype), quant)
    with jax.enable_x64(True):
        assert_quantised(rng.standard_normal((50, 128)) * 10.0 ** rng.integers(-50, 50, (50, 1)), quant)


def test_quantize_by_hand():
    x = np.array([[1.0, -2.0, 3.5, 0.0, 0.0, -0.0, 0.0, 0.0]], np.float32)
    elements, scales = _quant.quantize(x, QuantConfig(dtype="int8", block_size=4, scale_dtype="float8_e8m0fnu"))
    assert elements.tolist() == [[32, -64, 112, 0, 0, 0, 0, 0]]
    assert scales.astype(jnp.float32).tolist() == [[2.0**-5, 2.0**-96]]
    elements, scales = _quant.quantize(x, QuantConfig(block_size=8))
    assert elements.astype(jnp.float32).tolist() == [[128, -256, 448, 0, 0, -0.0, 0, 0]]
    assert scales.tolist() == [[0.0078125]]


@pytest.mark.parametrize("quant", suite.QUANTS, ids=quant_id)
def test_dequantize_is_elements_times_scales(quant):
    # But the first, which is subnormal in float32, as products may be: hardware may take those for zero.
    every_scale = np.arange(1, 2**8, dtype=np.uint8).view(jnp.float8_e8m0fnu)[:, None]
    if quant.scale_dtype == "float32":
        every_scale = every_scale.astype(np.float32)
    every_element = np.arange(2**8, dtype=np.uint8).view(np.dtype(quant.dtype))
    elements = np.broadcast_to(every_element, (len(every_scale), 2**8))
    out = jax_ep.DispatchOutput(elements, None, None, quant=jax_ep.QuantOutput(every_scale))
    with np.errstate(all="ignore"):
        want = elements.astype(np.float32) * every_scale.astype(np.float32)
    got = np.asarray(jax.jit(lambda: jax_ep.dequantize(out, jnp.float32))())
    np.testing.assert_allclose(got, want, rtol=0, atol=suite.FLUSHED)


@pytest.mark.parametrize("mode, layout", suite.ARRANGEMENTS[2:], ids=suite.arrangement_id)
def test_gradients_go_straight_through(mode, layout):
    """They are those of the same layer without quantisation, at what the quantised rows stand for."""
    case = Case(num_ranks=2, hidden_size=32, mode=mode, layout=layout)
    quant = QuantConfig(block_size=16)
    mesh = suite.make_mesh("reference", 2)
    with suite.communicator("reference", mesh, case) as comm:
        inputs = suite.place(suite.draw(case), mesh, comm.capacity)

        def derivatives(x, quant):
            @jax.shard_map(mesh=mesh, in_specs=(P("ep"),) * 3, out_specs=P("ep"))
            def layer(x, weights, topk_ids):
                out, handle = comm.dispatch(x, topk_ids, weights, quant=quant)
                tokens = out.tokens if quant is None else jax_ep.dequantize(out, jnp.float32)
                out = dataclasses.replace(out, tokens=jnp.tanh(tokens), quant=None)
                return comm.combine(suite.apply_experts(out, jnp.ones((12, 32))), handle)

            def linearised(inputs):
                out, pull = jax.vjp(lambda x, weights: layer(x, weights, inputs.topk_ids), x, inputs.weights)
                return out, pull(inputs.gradient)

            return jax.jit(linearised)(inputs)

        stand_for = suite.put(suite.quantised_and_back(np.asarray(inputs.x), quant), mesh, P("ep"))
        got, want = derivatives(inputs.x, quant), derivatives(stand_for, None)
        assert np.asarray(got[1][0]).any()
        programs.assert_close(got, want)
