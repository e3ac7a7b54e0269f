"""Layers whose experts have replicas against the dense layer, which has none; and which replica a token goes to."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from suite import EXPERT_MAJOR, FLAT, LOW_LATENCY, RANK_MAJOR, Case
from test_examples import ROOT, run_python

import jax_ep
from jax_ep import _placement, eplb
from jax_ep.eplb import ExpertPlacement

# Experts that R = 4 ranks cannot share evenly; rank 1 has one and two empty slots, expert 0 three replicas.
EMPTY_SLOTS = [0, 1, 2, 3, -1, -1, 4, 0, -1, 5, 3, 0]
# Two replicas of 1 on rank 0, four in all.
FULL_SLOTS = [1, 1, 9, 0, 1, 2, 3, 1, 4, 5, 6, 0, 7, 8, 0, 9]


def placement_of(slots) -> ExpertPlacement:
    return ExpertPlacement.from_slots(np.array(slots, np.int32), int(max(slots)) + 1)


def draw_slots(rng: np.random.Generator, num_experts: int, num_slots: int) -> np.ndarray:
    """Every expert somewhere, and anything elsewhere."""
    rest = rng.integers(-1, num_experts, num_slots - num_experts)
    return rng.permutation(np.concatenate([np.arange(num_experts), rest])).astype(np.int32)


# ---- the layer ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """The suite's layer of logical experts, on a communicator of slots."""

    case: Case
    slots: tuple[int, ...]
    tied: bool = False  # the parameters are those of slots, and `tie_replicas` sums their gradients


def make_step(comm: jax_ep.MoECommunicator, layer: Layer):
    case, specs, traces = layer.case, suite.input_specs(comm.mesh), []
    by_rank = NamedSharding(comm.mesh, P("ep"))

    def on_each_rank(x, weights, scale, gain, row_bias, topk_ids, placement):
        scale = eplb.tie_replicas(scale, placement) if layer.tied else scale
        weights = weights if case.weighted else None
        if case.max_requests:
            out, handle = comm.dispatch_async(x, topk_ids, weights, placement=placement, quant=case.quant).wait()
        else:
            out, handle = comm.dispatch(x, topk_ids, weights, placement=placement, quant=case.quant)
        y = suite.apply_experts(out, scale * gain, x.dtype)
        return suite.combine(comm, y + row_bias.reshape(y.shape), handle), suite.observed(out)

    mapped = jax.shard_map(
        on_each_rank, mesh=comm.mesh, in_specs=(*specs[:6], P()), out_specs=P("ep"), check_vma=case.check_vma
    )

    @jax.jit
    def step(inputs: suite.Inputs, placement: ExpertPlacement) -> suite.Result:
        traces.append(1)

        def forward(x, weights, scale, *others):
            if not layer.tied:
                scale = jax.sharding.reshard(eplb.replicate_experts(scale, placement), by_rank)
            return mapped(x, weights, scale, *others, inputs.topk_ids, placement)

        out, pull, received = jax.vjp(forward, *inputs[:5], has_aux=True)
        return suite.Result(received, out, pull(inputs.gradient))

    return step, traces


def place(inputs: suite.Inputs, mesh, capacity: int, layer: Layer) -> suite.Inputs:
    """On the mesh; the experts' parameters are split where their number allows."""
    scale, num_ranks = inputs.scale, mesh.shape["ep"]
    if layer.tied:
        slots = np.array(layer.slots)
        scale = np.where(slots[:, None] >= 0, scale[slots], 0).astype(scale.dtype)
    placed = suite.place(inputs._replace(scale=np.zeros((num_ranks, 1))), mesh, capacity)
    return placed._replace(scale=suite.put(scale, mesh, P("ep") if len(scale) % num_ranks == 0 else P()))


def communicator(implementation: str, mesh, layer: Layer, **arguments) -> jax_ep.MoECommunicator:
    return suite.communicator(implementation, mesh, layer.case, num_experts=len(layer.slots), **arguments)


def check_layer(implementation: str, layer: Layer, other_slots=()) -> None:
    """Against the dense layer, with one program for all placements."""
    num_ranks = suite.num_ranks_at_most(implementation, layer.case.num_ranks)
    layer = dataclasses.replace(layer, case=dataclasses.replace(layer.case, num_ranks=num_ranks))
    mesh, inputs = suite.make_mesh(implementation, num_ranks), suite.draw(layer.case)
    with communicator(implementation, mesh, layer) as comm:
        step, traces = make_step(comm, layer)
        for slots in (layer.slots, *other_slots):
            layer = dataclasses.replace(layer, slots=tuple(slots))
            placed = place(inputs, mesh, comm.capacity, layer)
            result = jax.block_until_ready(step(placed, placement_of(slots)))
            comm.check()
            if layer.tied:
                result = result._replace(gradients=of_logical(result.gradients, slots, mesh))
            suite.assert_dense(layer.case, inputs, result)
            assert int(result.received.num_dropped.sum()) == 0
        assert len(traces) == step._cache_size() == 1


def of_logical(gradients, slots, mesh):
    """With the parameters' gradients by expert: all replicas have the same bits."""
    scale, slots = np.asarray(gradients[2]), np.array(slots)
    first = np.array([np.flatnonzero(slots == expert)[0] for expert in range(slots.max() + 1)])
    np.testing.assert_array_equal(scale[slots >= 0], scale[first][slots[slots >= 0]])
    assert not scale[slots < 0].any()
    return (*gradients[:2], suite.put(scale[first], mesh, P()), *gradients[3:])


FULL, EMPTY = tuple(FULL_SLOTS), tuple(EMPTY_SLOTS)
FP8 = jax_ep.QuantConfig(block_size=16)
LAYERS = {
    "ht-flat-tied": Layer(Case(4, num_experts=10, routing="skewed", expert_alignment=4), FULL, tied=True),
    "ht-flat-empty-requests": Layer(Case(4, num_experts=6, max_requests=1), EMPTY),
    "ht-rank-major": Layer(Case(4, num_experts=10, layout=RANK_MAJOR, routing="skewed", topk=3), FULL),
    "ll-expert-major": Layer(Case(4, num_experts=6, mode=LOW_LATENCY, layout=EXPERT_MAJOR, weighted=False), EMPTY),
    "ll-flat-fp8": Layer(Case(4, num_experts=10, mode=LOW_LATENCY, layout=FLAT, quant=FP8, hidden_size=32), FULL),
    "ll-rank-major-tied": Layer(
        Case(4, num_experts=6, mode=LOW_LATENCY, layout=RANK_MAJOR, check_vma=False), EMPTY, tied=True
    ),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_is_the_dense_layer(native_implementation, layer):
    check_layer(native_implementation, layer)


def test_reference_is_the_dense_layer():
    check_layer("reference", LAYERS["ht-flat-empty-requests"])


def test_many_tokens_are_sorted(native_implementation, monkeypatch):
    monkeypatch.setattr(_placement, "_MOST_COMPARED", 0)
    check_layer(native_implementation, LAYERS["ht-flat-tied"])


def test_no_tokens():
    layer = Layer(Case(2, num_experts=6, num_tokens=0), EMPTY)
    mesh = suite.make_mesh("reference", 2)
    with communicator("reference", mesh, layer) as comm:
        mapped = jax.shard_map(
            lambda x, topk_ids: comm.dispatch(x, topk_ids, placement=placement_of(EMPTY))[0].num_dropped[None],
            mesh=comm.mesh,
            in_specs=P("ep"),
            out_specs=P("ep"),
        )
        x, topk_ids = np.zeros((0, 16), np.float32), np.zeros((0, 2), np.int32)
        assert not jax.jit(mapped)(suite.put(x, mesh, P("ep")), suite.put(topk_ids, mesh, P("ep"))).any()


@pytest.mark.parametrize("tied", [False, True], ids=["replicated", "tied"])
def test_a_new_placement_is_no_new_program(native_implementation, tied):
    layer = Layer(Case(4, num_experts=10, routing="skewed"), FULL, tied)
    load = np.random.default_rng(0).zipf(1.5, (2, 10))
    plan = eplb.rebalance_experts(load, 16, 1, 1, 4)
    rolled = [-1, -1, -1, -1, -1, -1, *np.roll(np.arange(10), 3)]
    check_layer(native_implementation, layer, [*plan.physical_to_logical.tolist(), rolled])


def test_a_token_may_name_an_expert_twice(native_implementation):
    """With an expert's replicas on one rank and on several."""
    ids = np.array([[1, 1, -1, 0], [1, 1, 1, 1], [-1, -1, -1, -1], [0, 9, 1, 2]], np.int32)
    layer = Layer(Case(2, num_tokens=2, num_experts=10, topk=4), FULL)
    num_ranks = suite.num_ranks_at_most(native_implementation, 2)
    layer = dataclasses.replace(
        layer, case=dataclasses.replace(layer.case, num_ranks=num_ranks, num_tokens=4 // num_ranks)
    )
    mesh, inputs = suite.make_mesh(native_implementation, num_ranks), suite.draw(layer.case)._replace(topk_ids=ids)
    with communicator(native_implementation, mesh, layer) as comm:
        step, _ = make_step(comm, layer)
        result = jax.block_until_ready(step(place(inputs, mesh, comm.capacity, layer), placement_of(FULL)))
        comm.check()
    suite.assert_dense(layer.case, inputs, result)


@pytest.mark.parametrize("bad", [10, -2, np.iinfo(np.int32).min, np.iinfo(np.int32).max])
def test_bad_ids(implementation, bad):
    layer = Layer(Case(2, num_experts=10), FULL)
    num_ranks = suite.num_ranks_at_most(implementation, 2)
    layer = dataclasses.replace(layer, case=dataclasses.replace(layer.case, num_ranks=num_ranks))
    mesh, inputs = suite.make_mesh(implementation, num_ranks), suite.draw(layer.case)
    inputs.topk_ids[3, 1] = bad
    with communicator(implementation, mesh, layer) as comm:

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        def dispatch(x, topk_ids):
            return comm.dispatch(x, topk_ids, placement=placement_of(FULL))[0].tokens

        placed = suite.place(inputs, mesh, comm.capacity)
        assert np.isnan(jax.block_until_ready(dispatch(placed.x, placed.topk_ids))).any()
        with pytest.raises(jax_ep.ExpertIdError, match=r"-1 or an expert in \[0, 10\), got 1 other entries on rank 0"):
            comm.check()


def test_capacity_is_that_of_ranks(native_implementation):
    """All tokens to one expert: without replicas one rank gets them all."""
    case = Case(2, num_tokens=8, num_experts=3, topk=1, capacity=8)
    mesh = suite.make_mesh(native_implementation, 2)
    topk_ids = suite.put(np.zeros((16, 1), np.int32), mesh, P("ep"))
    x = suite.put(np.ones((16, 16), np.float32), mesh, P("ep"))
    with communicator(native_implementation, mesh, Layer(case, (0, 1, 2, 0))) as comm:

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=(P("ep"), P("ep"), P()), out_specs=P("ep"))
        def received(x, topk_ids, placement):
            return comm.dispatch(x, topk_ids, placement=placement)[0].layout.num_tokens_per_expert

        counts = jax.block_until_ready(received(x, topk_ids, placement_of([0, 1, 2, 0])))
        comm.check()
        np.testing.assert_array_equal(counts, [8, 0, 0, 8])
        jax.block_until_ready(received(x, topk_ids, placement_of([0, 1, 2, -1])))
        with pytest.raises(jax_ep.CapacityError, match="expected at least 16, which rank 0 needed, got 8"):
            comm.check()


# ---- which replica --------------------------------------------------------------------------------------------------


def slots_one_by_one(ids: np.ndarray, slots, rank: int) -> np.ndarray:
    num_experts, seen, found = max(slots) + 1, {}, np.empty(ids.size, int)
    for i, expert in enumerate(ids.reshape(-1).tolist()):
        replicas = np.flatnonzero(np.array(slots) == expert)
        turn = seen[expert] = seen.get(expert, -1) + 1
        is_expert = 0 <= expert < num_experts
        found[i] = replicas[(turn + rank) % len(replicas)] if is_expert else -1 if expert == -1 else -2
    return found.reshape(ids.shape)


physical = jax.jit(eplb.to_physical)


# The last is sorted, the others are compared.
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (0, 2), (1024,), (400, 8)])
@given(seed=st.integers(0, 2**32), rank=st.integers(0, 9), spread=st.sampled_from([1, 4, 20]))
def test_replicas_take_turns(shape, seed, rank, spread):
    rng = np.random.default_rng(seed)
    slots = draw_slots(rng, 12, 20)
    ids = rng.integers(-3, spread, shape).astype(np.int32)
    got = np.asarray(physical(ids, placement_of(slots), rank))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, slots_one_by_one(ids, slots, rank))
    for expert in range(12):
        replicas = np.flatnonzero(slots == expert)
        counts = (got[..., None] == replicas).reshape(-1, len(replicas)).sum(0)
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == (ids == expert).sum()


def test_ranks_begin_with_different_replicas():
    placement = placement_of([0, 0, 0, 0, 1, 2])
    firsts = [int(physical(np.zeros((1, 1), np.int32), placement, rank)[0, 0]) for rank in range(4)]
    assert firsts == [0, 1, 2, 3]


def test_ranks_may_be_numpys():
    ids, placement = np.zeros((2, 3), np.int32), placement_of(EMPTY_SLOTS)
    ranks = np.int64(3), np.array(3, np.uint8), jnp.int32(3)
    for got in jax.jit(lambda: [eplb.to_physical(ids, placement, rank) for rank in ranks])():
        np.testing.assert_array_equal(got, physical(ids, placement, 3))


def test_an_expert_without_a_slot_is_out_of_range():
    placement = from_traced_slots(jnp.array([2, 0, -1, 2], jnp.int32), 4)
    np.testing.assert_array_equal(
        eplb.to_physical(jnp.arange(-1, 5, dtype=np.int32), placement, 0), [-1, 1, -2, 0, -2, -2]
    )


from_traced_slots = jax.jit(ExpertPlacement.from_slots, static_argnums=1)


@given(seed=st.integers(0, 2**32))
def test_placements_of_plans_and_of_slots(seed):
    rng = np.random.default_rng(seed)
    plan = eplb.rebalance_experts(rng.integers(0, 99, (3, 12)), 20, 1, 1, 4)
    for layer in range(3):
        placement = ExpertPlacement.from_plan(plan, layer)
        assert (placement.num_experts, placement.num_slots) == (12, 20)
        traced = from_traced_slots(placement.physical_to_logical, 12)
        for one in (placement, traced):
            np.testing.assert_array_equal(one.physical_to_logical, plan.physical_to_logical[layer])
            np.testing.assert_array_equal(one.num_replicas_per_expert, plan.num_replicas_per_expert[layer])
            _, slots, first, counts = map(np.asarray, jax.tree.leaves(one))
            for expert, replicas in enumerate(plan.logical_to_physical[layer]):
                mine = slots[first[expert] : first[expert] + counts[expert]]
                np.testing.assert_array_equal(mine, replicas[: counts[expert]])


# ---- parameters and gradients ---------------------------------------------------------------------------------------


def sums_of(grads: np.ndarray, slots) -> np.ndarray:
    sums = np.zeros((max(slots) + 1, *grads.shape[1:]))
    for slot, expert in enumerate(slots):
        if expert >= 0:
            sums[expert] += grads[slot]
    return sums


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("slots", [EMPTY_SLOTS, FULL_SLOTS], ids=["empty", "full"])
def test_parameters_and_gradients(implementation, axis_type, slots):
    num_ranks = suite.num_ranks_at_most(implementation, 4)
    mesh = suite.make_mesh(implementation, num_ranks, axis_type=axis_type)
    rng, slots, placement = np.random.default_rng(0), np.array(slots), placement_of(slots)
    num_experts, num_slots = placement.num_experts, len(slots)
    logical, grads = rng.normal(size=(num_experts, 3, 2)).astype(np.float32), rng.normal(size=(num_slots, 5))
    grads = grads.astype(jnp.bfloat16)
    replicated = P("ep") if num_experts % num_ranks == 0 else P()
    tree = dict(a=suite.put(logical, mesh, replicated), b=suite.put(logical[:, 0], mesh, replicated))
    physical = jax.jit(eplb.replicate_experts)(tree, placement)
    np.testing.assert_array_equal(physical["a"], np.where(slots[:, None, None] >= 0, logical[slots], 0))
    assert physical["b"].shape == (num_slots, 2)

    on_mesh, sums = suite.put(grads, mesh, P("ep")), sums_of(grads.astype(np.float64), slots)
    summed = jax.jit(eplb.sum_replica_gradients)(on_mesh, placement)
    assert summed.dtype == jnp.bfloat16
    suite.assert_rounded("sum", "bfloat16", summed, sums, terms=sums_of(np.abs(grads.astype(np.float64)), slots))
    shared = jax.jit(eplb.share_replica_gradients)(on_mesh, placement)
    by_rank = jax.jit(
        jax.shard_map(eplb.share_replica_gradients, mesh=mesh, in_specs=(P("ep"), P()), out_specs=P("ep"))
    )(on_mesh, placement)
    for got in (shared, by_rank):
        assert got.sharding.is_equivalent_to(on_mesh.sharding, 2)
        np.testing.assert_array_equal(np.asarray(got)[slots >= 0], np.asarray(summed)[slots[slots >= 0]])
        np.testing.assert_array_equal(np.asarray(got)[slots < 0], grads[slots < 0])


def test_summing_is_the_transpose_of_replicating():
    """Sums of bfloat16 in float32 as well."""
    placement, rng = placement_of([0] * 11 + [1]), np.random.default_rng(0)
    logical, grads = (rng.normal(size=(rows, 3)).astype(jnp.bfloat16) for rows in (2, 12))

    @jax.jit
    def pull(grads):
        return jax.vjp(lambda params: eplb.replicate_experts(params, placement), logical)[1](grads)[0]

    np.testing.assert_array_equal(pull(grads), jax.jit(eplb.sum_replica_gradients)(grads, placement))
    np.testing.assert_array_equal(pull(grads)[0], grads[:11].astype(np.float64).sum(0).astype(jnp.bfloat16))


def shared_by_rank(mesh, grads, placement):
    share = jax.shard_map(eplb.share_replica_gradients, mesh=mesh, in_specs=(P("ep"), P()), out_specs=P("ep"))
    return share(grads, placement)


@pytest.mark.parametrize(
    ("dtype", "slots"), [("complex64", EMPTY_SLOTS), ("float16", FULL_SLOTS), ("float32", [0] * 11 + [1])]
)
def test_sums_of_each_dtype(native_implementation, dtype, slots):
    """In the order of slots, by ranks and of global arrays: whole numbers have but one sum."""
    mesh = suite.make_mesh(native_implementation, suite.num_ranks_at_most(native_implementation, 4))
    rng, slots, placement = np.random.default_rng(0), np.array(slots), placement_of(slots)
    grads = rng.integers(-9, 9, (len(slots), 3)).astype(dtype)
    if dtype == "complex64":
        grads += 1j * rng.integers(-9, 9, grads.shape).astype(np.float32)
    sums = np.array([grads[slots == expert].sum(0) for expert in range(slots.max() + 1)])
    wanted = np.where(slots[:, None] >= 0, sums[slots], grads)
    summed = jax.jit(eplb.sum_replica_gradients)(grads, placement)
    shared = jax.jit(eplb.share_replica_gradients)(grads, placement)
    by_rank = jax.jit(lambda *arguments: shared_by_rank(mesh, *arguments))(suite.put(grads, mesh, P("ep")), placement)
    for got, want in ((summed, sums), (shared, wanted), (by_rank, wanted)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)


def test_no_sum_is_in_any_order():
    """GPUs scatter in any order, so that three terms may have another sum each time."""
    mesh = suite.make_mesh("reference", 4, axis_type=AxisType.Auto)
    placement = placement_of(EMPTY_SLOTS)

    def by_expert(params):
        return jnp.square(eplb.replicate_experts(params, placement)).sum()

    for function, shape in [
        (lambda grads: shared_by_rank(mesh, grads, placement), (12, 3)),
        (lambda grads: eplb.share_replica_gradients(grads, placement), (12, 3)),
        (lambda grads: eplb.sum_replica_gradients(grads, placement), (12, 3)),
        (jax.grad(by_expert), (6, 3)),
    ]:
        program = str(jax.make_jaxpr(function)(jnp.ones(shape)))
        assert "gather" in program and "scatter-add" not in program


def test_sums_are_the_same_each_time(native_implementation):
    """Bitwise, of many replicas on one rank."""
    slots = np.random.default_rng(0).permutation([0] * 20 + [1] * 9 + [2, 3, -1])
    num_ranks = suite.num_ranks_at_most(native_implementation, 2)
    mesh, placement = suite.make_mesh(native_implementation, num_ranks), placement_of(slots)
    grads = suite.put(np.random.default_rng(1).normal(size=(32, 5000)).astype(np.float32), mesh, P("ep"))
    share = jax.jit(lambda grads: shared_by_rank(mesh, grads, placement))
    first = np.asarray(share(grads))
    for _ in range(5):
        np.testing.assert_array_equal(share(grads), first)


@pytest.mark.parametrize("mapped", [False, True], ids=["global", "by rank"])
def test_integers_have_no_gradient(mapped):
    """As of quantised kernels, beside their scales."""
    mesh = suite.make_mesh("reference", 4, axis_type=AxisType.Auto)
    rng, slots, placement = np.random.default_rng(0), np.array(EMPTY_SLOTS), placement_of(EMPTY_SLOTS)
    params = dict(q=rng.integers(-9, 9, (6, 3)).astype(np.int8), scale=rng.normal(size=(6, 1)).astype(np.float32))

    def tied(params):
        params = eplb.tie_replicas(params, placement)
        return params["q"].astype(jnp.float32) * params["scale"]

    def by_slot(params):
        function = jax.shard_map(tied, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")) if mapped else tied
        return function(params).sum()

    def by_expert(params):
        params = eplb.replicate_experts(params, placement)
        return (params["q"].astype(jnp.float32) * params["scale"]).sum()

    wanted = np.bincount(slots[slots >= 0])[:, None] * params["q"].sum(1, keepdims=True, dtype=np.float32)
    physical = eplb.replicate_experts(params, placement)
    got, by_expert = (jax.jit(jax.grad(f, allow_int=True))(p) for f, p in ((by_slot, physical), (by_expert, params)))
    np.testing.assert_allclose(by_expert["scale"], wanted)
    np.testing.assert_allclose(got["scale"], np.where(slots[:, None] >= 0, wanted[slots], 0))
    assert got["q"].dtype == by_expert["q"].dtype == jax.dtypes.float0
    assert got["q"].shape == (12, 3) and by_expert["q"].shape == (6, 3)
    scale = physical.pop("scale")
    alone = jax.jit(jax.grad(lambda scale: by_slot(dict(physical, scale=scale))))(scale)
    np.testing.assert_array_equal(alone, got["scale"])


def test_without_replicas_gradients_are_as_they_came():
    grads = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(eplb.share_replica_gradients(grads, placement_of([3, 1, 0, 2])), grads)


def test_no_right_sum_is_nan():
    """Two experts have no slot, so more have replicas than there is room for."""
    slots = jnp.array([0, 0, 1, 1, 2, 2], jnp.int32)
    share = jax.jit(lambda slots: eplb.share_replica_gradients(jnp.ones((6, 1)), ExpertPlacement.from_slots(slots, 5)))
    assert np.isnan(share(slots)).all()


# ---- recorder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["handle", "output", "ids"])
def test_recorder(native_implementation, by):
    """Steps in a scan, over a window shorter than they are."""
    num_steps, window, dp = 5, 3, 2
    num_ranks = suite.num_ranks_at_most(native_implementation, 2)
    if len(suite.devices_of(native_implementation)) < num_ranks * dp:
        num_ranks = 1
    case = Case(num_ranks, num_tokens=7, num_experts=6, layout=RANK_MAJOR if by == "output" else FLAT)
    mesh = suite.make_mesh(native_implementation, num_ranks, dp)
    shape = num_steps, dp * num_ranks * 7, 2
    topk_ids = suite.draw_topk_ids(np.random.default_rng(0), case, num_steps * shape[1]).reshape(shape)
    recorder = eplb.LoadRecorder(6, data_axes=("dp",))
    with communicator(native_implementation, mesh, Layer(case, EMPTY)) as comm:

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=(P(None, ("dp", "ep")), P(), P()), out_specs=P())
        def run(topk_ids, state, placement):
            x = jnp.ones((7, 16))

            def step(state, topk_ids):
                out, handle = comm.dispatch(x, topk_ids, placement=placement)
                return recorder.record(state, dict(handle=handle, output=out, ids=topk_ids)[by], placement), None

            return jax.lax.scan(step, state, topk_ids)[0]

        state = run(suite.put(topk_ids, mesh, P(None, ("dp", "ep"))), recorder.init(window), placement_of(EMPTY))
        state = jax.block_until_ready(state)
    counts = np.array([[(ids == expert).sum() for expert in range(6)] for ids in topk_ids])
    assert state.dtype == jnp.int32
    np.testing.assert_array_equal(state, counts[-window:])
    np.testing.assert_array_equal(recorder.load(state), counts[-window:].sum(0))
    np.testing.assert_array_equal(recorder.push(state, jnp.arange(6, dtype=jnp.int32))[1:], [counts[-1], np.arange(6)])


def test_recording_costs_one_psum():
    """Over both axes, one of which has its name instead of a tuple."""
    mesh = suite.make_mesh("reference", 2, 2, axis_type=AxisType.Auto)
    recorder, tokens = eplb.LoadRecorder(np.int64(6), data_axes="dp"), P(("dp", "ep"))
    assert recorder == eplb.LoadRecorder(6, data_axes=("dp",)) and type(recorder.num_experts) is int
    record = jax.shard_map(recorder.record, mesh=mesh, in_specs=(P(), tokens), out_specs=P())
    ids = np.random.default_rng(0).integers(0, 6, (24, 2)).astype(np.int32)
    program = str(jax.make_jaxpr(record)(recorder.init(3), ids))
    collectives = re.findall(r"\b(?:psum|pmax|ppermute|all_|reduce_scatter)\w*(?=\[)", program)
    assert len(collectives) == 1 and collectives[0].startswith("psum"), collectives
    np.testing.assert_array_equal(jax.jit(record)(recorder.init(3), ids)[-1], np.bincount(ids.reshape(-1), minlength=6))


@pytest.mark.parametrize("by", ["handle", "ids"])
def test_recorder_and_drops(by):
    """Of slots without a placement: rows that were dropped count as ids, and not as rows."""
    case = Case(2, num_tokens=6, num_experts=4, capacity=5, overflow="drop", routing="skewed")
    recorder = eplb.LoadRecorder(4)
    with suite.communicator("reference", suite.make_mesh("reference", 2), case) as comm:
        inputs = suite.place(suite.draw(case), comm.mesh, comm.capacity)

        @jax.jit
        @jax.shard_map(mesh=comm.mesh, in_specs=(P("ep"), P("ep"), P()), out_specs=(P(), P("ep")))
        def run(x, topk_ids, state):
            out, handle = comm.dispatch(x, topk_ids)
            return recorder.record(state, handle if by == "handle" else topk_ids), out.num_dropped[None]

        state, dropped = jax.block_until_ready(run(inputs.x, inputs.topk_ids, recorder.init(2)))
    dropped = int(dropped.sum())
    assert dropped > 0 and not state[0].any()
    assert int(recorder.load(state).sum()) == (np.asarray(inputs.topk_ids) >= 0).sum() - dropped * (by == "handle")


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "error", "text"),
    [
        ([0.0, 1.0], TypeError, "physical_to_logical: expected an integer dtype, got float64"),
        ([[0, 1]], ValueError, "physical_to_logical: expected shape [P], got shape [1, 2]"),
        ([0, 1, 2], ValueError, "physical_to_logical: expected -1 or experts from 0 to 1, got [2]"),
        ([0, 1, -2], ValueError, "physical_to_logical: expected -1 or experts from 0 to 1, got [-2]"),
        ([0, 0, -1], ValueError, "physical_to_logical: expected a slot for every expert, got none for [1]"),
    ],
)
def test_unusable_slots(slots, error, text):
    with pytest.raises(error) as raised:
        ExpertPlacement.from_slots(np.array(slots), 2)
    assert text in str(raised.value)


def test_unusable_arguments():
    placement, plan = placement_of([0, 1, 0, -1]), eplb.rebalance_experts([[1, 2]], 4, 1, 1, 2)
    ids, grads = jnp.zeros((2, 2), jnp.int32), jnp.zeros((3, 2))
    recorder = eplb.LoadRecorder(2)
    for call, error, text in [
        (lambda: ExpertPlacement.from_plan(plan[0]), TypeError, "plan: expected a Placement, got ndarray"),
        (
            lambda: ExpertPlacement.from_plan(plan, 1),
            ValueError,
            "layer: expected below the 1 layers of the plan, got 1",
        ),
        (lambda: eplb.to_physical(ids, plan, 0), TypeError, "placement: expected an ExpertPlacement, got Placement"),
        (lambda: eplb.to_physical(grads, placement, 0), TypeError, "topk_ids: expected dtype int32, got float32"),
        (
            lambda: eplb.to_physical(ids, jax.tree.map(lambda a: a[None], placement), 0),
            ValueError,
            "placement: expected the placement of one layer, got slots of shape [1, 4]",
        ),
        (lambda: eplb.to_physical(ids, placement, -1), ValueError, "rank: expected at least 0, got -1"),
        (lambda: eplb.to_physical(ids, placement, jnp.int32(-2)), ValueError, "rank: expected at least 0, got -2"),
        (lambda: eplb.to_physical(ids, placement, 1.0), TypeError, "rank: expected an int, got float 1.0"),
        (
            lambda: eplb.to_physical(ids, placement, ids),
            TypeError,
            "rank: expected one integer, got int32 of shape [2, 2]",
        ),
        (
            lambda: eplb.replicate_experts(grads, placement),
            ValueError,
            "params: expected arrays of shape [2, ...], got",
        ),
        (lambda: eplb.sum_replica_gradients(grads, placement), ValueError, "grads: expected arrays of shape [4, ...]"),
        (
            lambda: eplb.share_replica_gradients(grads, placement),
            ValueError,
            "grads: expected arrays of shape [4, ...]",
        ),
        *(
            (
                lambda op=op: op(dict(gate=jnp.ones((4, 2), jnp.int8)), placement),
                TypeError,
                "grads['gate']: expected a floating or complex dtype, or float0, got int8",
            )
            for op in (eplb.sum_replica_gradients, eplb.share_replica_gradients)
        ),
        (lambda: recorder.init(0), ValueError, "window: expected at least 1, got 0"),
        (lambda: eplb.LoadRecorder(2.0), TypeError, "num_experts: expected an int, got float 2.0"),
        (
            lambda: eplb.LoadRecorder(2, data_axes=("dp", "ep")),
            ValueError,
            "data_axes: expected distinct axes besides 'ep', got ('dp', 'ep')",
        ),
        (lambda: recorder.count(ids), ValueError, "axis_name: expected an axis of the jax.shard_map around it"),
        (lambda: recorder.push(ids, ids), ValueError, "counts: expected shape [2], got shape [2, 2]"),
    ]:
        with pytest.raises(error) as raised:
            call()
        assert text in str(raised.value)


def test_unusable_placements():
    case = Case(2, num_experts=4)
    with suite.communicator("reference", suite.make_mesh("reference", 2), case) as comm:
        inputs = suite.place(suite.draw(case), comm.mesh, comm.capacity)

        def error_of(error, function):
            mapped = jax.shard_map(function, mesh=comm.mesh, in_specs=P("ep"), out_specs=P())
            with pytest.raises(error) as raised:
                jax.jit(mapped)(inputs.x, inputs.topk_ids)
            return str(raised.value)

        def beside_a_handle(x, ids):
            return comm.dispatch(x, previous_handle=comm.dispatch(x, ids)[1], placement=placement_of([0, 1, 0, 1]))

        three, four, slots = placement_of([0, 1, 0]), eplb.LoadRecorder(4), placement_of([0, 1, 0, 1])
        text = error_of(ValueError, lambda x, ids: comm.dispatch(x, ids, placement=three))
        assert text == "placement: expected 4 slots, got 3"
        text = error_of(TypeError, lambda x, ids: comm.dispatch(x, ids, placement=[0, 1, 0, 1]))
        assert text == "placement: expected an ExpertPlacement, got list"
        text = error_of(ValueError, beside_a_handle)
        assert text == "placement: expected None beside previous_handle, got an ExpertPlacement"
        text = error_of(ValueError, lambda x, ids: eplb.LoadRecorder(4, data_axes="dp").count(ids))
        assert text == "data_axes: expected an axis of the jax.shard_map around it, one of ('ep',), got 'dp'"
        text = error_of(ValueError, lambda x, ids: eplb.LoadRecorder(3).count(comm.dispatch(x, ids)[1]))
        assert text == "placement: expected one of 4 slots, got None"
        text = error_of(ValueError, lambda x, ids: four.count(comm.dispatch(x, ids)[1], slots))
        assert text == "placement: expected 4 slots and 4 experts, got 4 and 2"


# ---- the example ----------------------------------------------------------------------------------------------------


def test_example(native_implementation, tmp_path):
    sizes = "--steps 8 --every 2 --tokens 32 --hidden 16 --inner 16 --experts 14 --devices 4".split()
    if len(suite.devices_of(native_implementation)) < 4:
        sizes = sizes[:-2]
    output = run_python(native_implementation, tmp_path, ROOT / "examples" / "rebalance.py", *sizes)
    assert f"implementation {native_implementation}" in output
    assert "Rebalanced 3 times; the outputs stayed as they were, up to rounding." in output
    assert (tmp_path / "out" / "rebalance.png").stat().st_size > 0
    rows = [line.split() for line in output.splitlines() if line[:1].isdigit() and "-" in line.split()[0]]
    over_the_mean = {row[0]: float(row[2]) for row in rows}
    assert list(over_the_mean) == ["0-1", "2-3", "4-5", "6-7"]
    if "4" in sizes:  # the second and the last are of the stream that was planned for
        assert over_the_mean["2-3"] < over_the_mean["0-1"] and over_the_mean["6-7"] < over_the_mean["4-5"]


def test_example_plots_rows_and_times(monkeypatch):
    """Of each step, and their medians before and after a rebalancing."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("rebalance")
    history = example.History(busiest=[9, 8, 4, 5], mean=[4.0] * 4, seconds=[0.3, 0.5, 0.2, 0.1], moves={2: 3})
    figure = example.draw(history, argparse.Namespace(steps=4))
    for panel, values, medians in zip(
        figure.axes, ([9, 8, 4, 5], [300, 500, 200, 100]), ([8.5, 4.5], [400, 150]), strict=True
    ):
        assert any(np.array_equal(line.get_ydata(), values) for line in panel.lines)
        (before, after), segments = medians, panel.collections[0].get_segments()
        np.testing.assert_allclose(segments, [[[-0.5, before], [1.5, before]], [[1.5, after], [3.5, after]]])
        assert panel.get_ylim()[0] == 0
    assert [axes.get_ylabel() for axes in figure.axes] == ["rows a step", "ms a step"]
