"""The suite, with each backend as a fixture parameter."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import suite
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from suite import EXPERT_MAJOR, FLAT, HIGH_THROUGHPUT, LOW_LATENCY, RANK_MAJOR, Case

import jax_ep
from jax_ep import CapacityError, ExpertIdError

ARRANGEMENTS = pytest.mark.parametrize("mode, layout", suite.ARRANGEMENTS, ids=suite.arrangement_id)
# Each mode with its own layout.
MODES = pytest.mark.parametrize(
    "mode, layout", [(HIGH_THROUGHPUT, FLAT), (LOW_LATENCY, EXPERT_MAJOR)], ids=suite.arrangement_id
)


def no_tokens_crash(implementation: str) -> bool:
    """Whether XLA's compiler crashes where a differentiated `shard_map` has empty arrays: seen with jaxlib 0.11.2."""
    return jax.__version_info__ >= (0, 11) and len(suite.devices_of(implementation)) > 1


@st.composite
def cases(draw, implementation: str) -> Case:
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    num_devices = len(suite.devices_of(implementation))
    num_ranks = draw(st.sampled_from([r for r in (1, 2, 3, 4, 8) if r <= num_devices]))
    # Rows of a multiple of 16 bytes, as GPUs need.
    hidden_step = 16 // jnp.dtype(dtype).itemsize if implementation == "cuda" else 1
    least = int(no_tokens_crash(implementation))
    num_tokens = draw(st.one_of(st.integers(least, 40), st.integers(least, 300)))
    mode, layout = draw(st.sampled_from(suite.ARRANGEMENTS))
    has_slots = layout is EXPERT_MAJOR
    quant = draw(st.one_of(st.none(), st.sampled_from(suite.QUANTS)))
    if quant is not None:
        quant = dataclasses.replace(quant, block_size=draw(st.sampled_from([16, 32, 96])))
    return Case(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden_size=hidden_step * draw(st.integers(1, 48 // hidden_step)) if quant is None else 96,
        topk=draw(st.integers(1, 16)),
        # Slots are as many as all tokens, for each expert.
        num_experts=num_ranks * draw(st.integers(1, (16 if has_slots else 128) // num_ranks)),
        dtype=dtype,
        mode=mode,
        layout=layout,
        routing=draw(st.sampled_from(["uniform", "skewed", "single", "empty"])),
        weighted=draw(st.booleans()),
        expert_alignment=draw(st.sampled_from([1, 1, 4, 16])) if layout is FLAT else 1,
        max_tokens_per_rank=num_tokens + draw(st.integers(1, 3)),
        check_vma=draw(st.booleans()),
        quant=quant,
        came_quantised=quant is not None and draw(st.booleans()),
        max_requests=draw(st.integers(0, 1)),
        seed=draw(st.integers(0, 1000)),
    )


@hypothesis.given(data=st.data())
def test_random_cases(native_implementation, data):
    suite.check_case(native_implementation, data.draw(cases(native_implementation)))


def small_case(implementation: str, num_ranks: int = 4, **arguments) -> Case:
    if implementation != "cuda" and (arguments.get("mode"), arguments.get("layout")) in suite.ARRANGEMENTS[:2]:
        pytest.skip("only GPUs have code of this mode for this layout; random cases have it everywhere")
    return Case(num_ranks=suite.num_ranks_at_most(implementation, num_ranks), **arguments)


@ARRANGEMENTS
@pytest.mark.parametrize("routing", ["uniform", "skewed", "single", "empty"])
def test_routing(implementation, mode, layout, routing):
    suite.check_case(
        implementation, small_case(implementation, mode=mode, layout=layout, routing=routing, num_tokens=21)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@ARRANGEMENTS
def test_narrow_floats(implementation, dtype, mode, layout):
    suite.check_case(
        implementation, small_case(implementation, dtype=dtype, mode=mode, layout=layout, topk=6, num_tokens=33)
    )


@ARRANGEMENTS
def test_float64(implementation, mode, layout):
    with jax.enable_x64(True):
        suite.check_case(implementation, small_case(implementation, dtype="float64", mode=mode, layout=layout, topk=4))


@pytest.mark.parametrize("num_tokens", [0, 1])
@ARRANGEMENTS
def test_few_tokens(implementation, num_tokens, mode, layout):
    if num_tokens == 0 and no_tokens_crash(implementation):
        pytest.skip("jaxlib 0.11.2 crashes while it compiles the gradients, the reference's alike, see docs/testing.md")
    suite.check_case(
        implementation, small_case(implementation, num_tokens=num_tokens, mode=mode, layout=layout, topk=3)
    )


@ARRANGEMENTS
def test_no_tokens_forward(implementation, mode, layout):
    case = small_case(implementation, num_tokens=0, mode=mode, layout=layout, topk=3)
    mesh = suite.make_mesh(implementation, case.num_ranks)
    tokens = P(mesh.axis_names)
    with suite.communicator(implementation, mesh, case) as comm:

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=tokens, out_specs=(tokens, tokens, tokens))
        def forward(x, topk_ids, weights):
            out, handle = comm.dispatch(x, topk_ids, weights)
            tokens = jnp.where(suite.holds_token(out)[..., None], out.tokens, 0)
            return tokens, out.layout.num_tokens_per_expert, comm.combine(out.tokens, handle)

        inputs = suite.place(suite.draw(case), mesh, comm.capacity)
        received, num_tokens_per_expert, combined = forward(inputs.x, inputs.topk_ids, inputs.weights)
        assert not received.any() and not num_tokens_per_expert.any()
        assert combined.shape == (0, case.hidden_size)


@ARRANGEMENTS
def test_all_quantisations_of_all_magnitudes(implementation, mode, layout):
    """In a program that is not differentiated, where slots without a token hold anything."""
    dtype = "bfloat16" if layout is FLAT else "float32"
    case = small_case(implementation, mode=mode, layout=layout, hidden_size=128, num_tokens=15, topk=3, dtype=dtype)
    suite.check_quantised(implementation, case)


# Each element type, with float32 and with powers of two, by dispatch and before it.
@pytest.mark.parametrize("came_quantised", [False, True], ids=["by_dispatch", "before"])
@ARRANGEMENTS
def test_quantised_rows(implementation, mode, layout, came_quantised):
    quant = suite.QUANTS[2 * [FLAT, RANK_MAJOR, EXPERT_MAJOR].index(layout) + came_quantised]
    sizes = dict(hidden_size=128, num_tokens=17, topk=3, dtype="bfloat16")
    case = small_case(
        implementation, mode=mode, layout=layout, quant=quant, came_quantised=came_quantised, check_vma=False, **sizes
    )
    suite.check_case(implementation, case)


def test_quantised_rows_of_a_poisoned_step(implementation):
    case = small_case(implementation, hidden_size=128, mode=LOW_LATENCY, layout=EXPERT_MAJOR)
    mesh = suite.make_mesh(implementation, case.num_ranks)
    tokens = P(mesh.axis_names)
    with suite.communicator(implementation, mesh, case) as comm:

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=tokens, out_specs=tokens)
        def forward(x, topk_ids):
            outs = [comm.dispatch(x, topk_ids, quant=quant)[0] for quant in suite.QUANTS]
            return [jax_ep.dequantize(out, x.dtype) for out in outs]

        inputs = suite.place(suite.draw(case), mesh, comm.capacity)
        bad = with_topk_ids(inputs, mesh, np.full_like(suite.draw(case).topk_ids, 99)).topk_ids
        for rows in jax.block_until_ready(forward(inputs.x, bad)):
            assert all(np.isnan(part).all() for _, part in suite.local(rows))
        with pytest.raises(ExpertIdError):
            comm.check()


@pytest.mark.parametrize("quant", suite.QUANTS[:1] + suite.QUANTS[-1:], ids=["float8_float32", "int8_powers_of_two"])
def test_quantised_rows_in_a_scan_with_remat(implementation, quant):
    """Layers of equal routing, and one without a scan."""
    case = small_case(implementation, hidden_size=128, mode=LOW_LATENCY, layout=EXPERT_MAJOR, quant=quant)

    def layer(comm, x, topk_ids, weights, factors):
        def body(handle, x):
            out, handle = comm.dispatch(x, None, weights, previous_handle=handle, quant=quant)
            return handle, comm.combine(suite.apply_experts(out, factors, x.dtype), handle)

        _, handle = comm.dispatch(x, topk_ids, weights)
        scanned = jax.lax.scan(jax.checkpoint(body), handle, jnp.stack([x, x]))[1]
        return scanned.sum(0) / 2, body(handle, x)[1]

    check_two_ways(implementation, case, layer)


def test_long_rows(native_implementation):
    suite.check_case(native_implementation, small_case(native_implementation, hidden_size=2056, num_tokens=5))


def test_unweighted(implementation):
    suite.check_case(implementation, small_case(implementation, weighted=False, check_vma=False, expert_alignment=8))


def test_automatic_mesh_axes(native_implementation):
    case = small_case(native_implementation)
    mesh = suite.make_mesh(native_implementation, case.num_ranks, axis_type=AxisType.Auto)
    suite.check_case(native_implementation, case, mesh)


@pytest.mark.parametrize("ep_first", [False, True], ids=["dp_ep", "ep_dp"])
def test_independent_groups(implementation, ep_first):
    num_ranks = suite.num_ranks_at_most(implementation, 8) // 2
    mesh = suite.make_mesh(implementation, max(2, num_ranks), dp=2, ep_first=ep_first)
    suite.check_case(implementation, Case(num_ranks=max(2, num_ranks)), mesh)


@ARRANGEMENTS
@pytest.mark.parametrize("routing", ["uniform", "single"])
def test_drop(native_implementation, mode, layout, routing):
    case = small_case(
        native_implementation,
        num_tokens=30,
        topk=3,
        mode=mode,
        layout=layout,
        routing=routing,
        capacity={FLAT: 40, RANK_MAJOR: 25, EXPERT_MAJOR: None}[layout],
        overflow="drop",
        expert_alignment=4 if layout is FLAT else 1,
    )
    suite.check_case(native_implementation, case)


@pytest.mark.parametrize("layout", [FLAT, RANK_MAJOR], ids=suite.arrangement_id)
def test_dropped_rows_contribute_nothing(implementation, layout):
    # Every row goes to the same expert, so that the last tokens of the last ranks are dropped.
    case = small_case(implementation, num_tokens=8, topk=1, routing="single", layout=layout, overflow="drop")
    num_kept = 8 * case.num_ranks - 5
    case = dataclasses.replace(case, capacity=num_kept)
    (got,) = suite.run(implementation, suite.make_mesh(implementation, case.num_ranks), case)
    assert sorted(np.asarray(got.received.num_dropped)) == [0] * (case.num_ranks - 1) + [5]
    for array in (got.out, *got.gradients[:2]):
        assert np.asarray(array)[:num_kept].all()
        assert not np.asarray(array)[num_kept:].any()


def step_and_inputs(comm, case: Case):
    return suite.make_step(comm, case), suite.place(suite.draw(case), comm.mesh, comm.capacity)


def with_topk_ids(inputs: suite.Inputs, mesh, topk_ids: np.ndarray) -> suite.Inputs:
    return inputs._replace(topk_ids=suite.put(topk_ids, mesh, P(mesh.axis_names)))


def assert_poisoned(comm, result: suite.Result) -> None:
    x_gradient, weights_gradient, *_, y_gradient = result.gradients
    # JAX's own derivative of the reference is 0 where nothing was routed.
    gradients = () if comm.config.implementation == "reference" else (x_gradient, weights_gradient, y_gradient)
    for array in (result.received.tokens, result.out, *gradients):
        assert np.isnan(np.asarray(array)).all()


def assert_fails_once(comm, case: Case, bad_topk_ids: np.ndarray, error, text: str) -> None:
    """The step's outputs are NaN on all ranks, its error is raised once, and the next step is right."""
    step, inputs = step_and_inputs(comm, case)
    assert_poisoned(comm, jax.block_until_ready(step(with_topk_ids(inputs, comm.mesh, bad_topk_ids))))
    with pytest.raises(error, match=text):
        comm.check()
    comm.check()
    suite.assert_dense(case, suite.draw(case), jax.block_until_ready(step(inputs)))
    comm.check()


def check_overflow(implementation: str, mode, layout, max_requests: int) -> None:
    case = small_case(implementation, num_tokens=8, topk=2, mode=mode, layout=layout, max_requests=max_requests)
    mesh = suite.make_mesh(implementation, case.num_ranks)
    num_tokens = 8 * case.num_ranks
    num_rows = num_tokens * (1 if layout is RANK_MAJOR else 2)
    if layout is EXPERT_MAJOR:  # whose experts have slots for all tokens, if each names it once
        capacity = None
        text = f"topk_ids: expected at most {num_tokens} rows for an expert, got {num_rows} on rank {mesh.size - 1},"
    else:
        capacity = num_rows - 1
        text = f"max_recv_tokens_per_rank: expected at least {num_rows}.* rank {mesh.size - 1} .*got {capacity}"
    with suite.communicator(implementation, mesh, case, max_recv_tokens_per_rank=capacity) as comm:
        all_to_the_last = np.full((num_tokens, 2), case.num_experts - 1, np.int32)
        assert_fails_once(comm, case, all_to_the_last, CapacityError, text)


@ARRANGEMENTS
def test_overflow_is_an_error(implementation, mode, layout):
    check_overflow(implementation, mode, layout, max_requests=0)


@pytest.mark.parametrize("bad_id", [24, -2, -(2**31)])
def test_expert_id_out_of_range(implementation, bad_id):
    case = small_case(implementation)
    with suite.communicator(implementation, suite.make_mesh(implementation, case.num_ranks), case) as comm:
        topk_ids = suite.draw(case).topk_ids.copy()
        topk_ids[-1, -1] = bad_id
        text = rf"topk_ids: expected -1 or an expert in \[0, 24\), got 1 other entries on rank {case.num_ranks - 1}"
        assert_fails_once(comm, case, topk_ids, ExpertIdError, text)


def test_the_next_call_raises_what_went_wrong(implementation):
    case = small_case(implementation)
    with suite.communicator(implementation, suite.make_mesh(implementation, case.num_ranks), case) as comm:
        step, inputs = step_and_inputs(comm, case)
        bad = np.full_like(suite.draw(case).topk_ids, 99)
        assert_poisoned(comm, jax.block_until_ready(step(with_topk_ids(inputs, comm.mesh, bad))))
        another_step = suite.make_step(comm, case)
        with pytest.raises(ExpertIdError, match="got 18 other entries on rank 0"):
            another_step(inputs)
        suite.assert_dense(case, suite.draw(case), jax.block_until_ready(another_step(inputs)))


@ARRANGEMENTS
def test_finite_differences(implementation, mode, layout):
    """The layer is linear in each argument, so that any step gives the derivative up to rounding."""
    case = small_case(implementation, num_ranks=2, num_tokens=5, hidden_size=8, num_experts=8, mode=mode, layout=layout)
    with suite.communicator(implementation, suite.make_mesh(implementation, case.num_ranks), case) as comm:
        step, inputs = step_and_inputs(comm, case)
        gradients = jax.block_until_ready(step(inputs)).gradients
        rng = np.random.default_rng(1)

        def loss(argument: int, value: np.ndarray) -> float:
            spec = suite.input_specs(comm.mesh)[argument]
            arguments = list(inputs)
            arguments[argument] = suite.put(value, comm.mesh, spec)
            out = jax.block_until_ready(step(suite.Inputs(*arguments))).out
            return np.vdot(np.asarray(out, np.float64), np.asarray(inputs.gradient, np.float64))

        for argument, gradient in enumerate(gradients):
            at = np.asarray(inputs[argument])
            direction = rng.standard_normal(at.shape).astype(at.dtype)
            difference = (loss(argument, at + direction) - loss(argument, at - direction)) / 2
            np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-4, atol=1e-4)


def test_number_of_tokens_may_change_between_calls(implementation):
    case = small_case(implementation, num_tokens=12)
    with suite.communicator(implementation, suite.make_mesh(implementation, case.num_ranks), case) as comm:
        for num_tokens in (12, 5):
            shorter = dataclasses.replace(case, num_tokens=num_tokens)
            step, inputs = step_and_inputs(comm, shorter)
            suite.assert_dense(shorter, suite.draw(shorter), jax.block_until_ready(step(inputs)))


def run_two_ways(comm, case: Case, layer):
    """`layer(x, topk_ids, weights, factors)` computes the same in two ways: both, each beside its gradients."""
    inputs = suite.place(suite.draw(case), comm.mesh, comm.capacity)
    tokens = P(comm.mesh.axis_names)
    mapped = jax.shard_map(layer, mesh=comm.mesh, in_specs=(tokens, tokens, tokens, P("ep")), out_specs=tokens)

    @jax.jit
    def run(inputs):
        (one, other), pull = jax.vjp(
            lambda x, weights: mapped(x, inputs.topk_ids, weights, inputs.scale), inputs.x, inputs.weights
        )
        no_gradient = jnp.zeros_like(inputs.gradient)
        return (one, pull((inputs.gradient, no_gradient))), (other, pull((no_gradient, inputs.gradient)))

    return jax.block_until_ready(run(inputs))


def check_two_ways(implementation: str, case: Case, layer, assert_equal=programs.assert_close) -> None:
    """`layer(comm, x, topk_ids, weights, factors)`, as for `run_two_ways`."""
    with suite.communicator(implementation, suite.make_mesh(implementation, case.num_ranks), case) as comm:
        assert_equal(*run_two_ways(comm, case, functools.partial(layer, comm)))


@ARRANGEMENTS
def test_previous_handle_is_as_good_as_its_topk_ids(implementation, mode, layout):
    case = small_case(implementation, num_tokens=11, topk=3, mode=mode, layout=layout)

    def layer(comm, x, topk_ids, weights, factors):
        _, earlier = comm.dispatch(jnp.ones_like(x), topk_ids, jnp.ones_like(weights))
        out, handle = comm.dispatch(x, None, weights, previous_handle=earlier)
        again = comm.combine(suite.apply_experts(out, factors), handle)
        out, handle = comm.dispatch(x, topk_ids, weights)
        return again, comm.combine(suite.apply_experts(out, factors), handle)

    check_two_ways(implementation, case, layer, suite.assert_same)


def test_previous_handle_keeps_its_weights(implementation):
    case = small_case(implementation, num_tokens=11, topk=3)

    def layer(comm, x, topk_ids, weights, factors):
        out, earlier = comm.dispatch(x, topk_ids, weights)
        want = comm.combine(suite.apply_experts(out, factors), earlier)
        out, handle = comm.dispatch(x, previous_handle=earlier)
        return comm.combine(suite.apply_experts(out, factors), handle), want

    check_two_ways(implementation, case, layer, suite.assert_same)


def test_a_handle_is_carried_through_a_scan(implementation):
    case = small_case(implementation)

    def layer(comm, x, topk_ids, weights, factors):
        _, handle = comm.dispatch(x, topk_ids, weights)

        def body(carry, _):
            x, handle = carry
            out, handle = comm.dispatch(x, previous_handle=handle)
            return (comm.combine(suite.apply_experts(out, jnp.ones_like(factors)), handle), handle), None

        (scanned, _), _ = jax.lax.scan(body, (x, handle), length=3)
        weight_sums = jnp.where(topk_ids >= 0, weights, 0).sum(1, keepdims=True)
        return scanned, x * weight_sums**3

    check_two_ways(implementation, case, layer)


# Requests.


@pytest.mark.parametrize("quant", [None, suite.QUANTS[0]], ids=["plain", "quantised"])
@ARRANGEMENTS
def test_halves_are_as_good_as_the_whole(native_implementation, mode, layout, quant):
    sizes = dict(num_tokens=13, topk=3, hidden_size=128, dtype="bfloat16")
    suite.check_halves(
        native_implementation, small_case(native_implementation, mode=mode, layout=layout, quant=quant, **sizes)
    )


def test_halves_of_the_reference():
    suite.check_halves("reference", Case(num_ranks=2))


@ARRANGEMENTS
def test_halves_along_a_previous_handle(native_implementation, mode, layout):
    case = small_case(native_implementation, num_tokens=11, topk=3, mode=mode, layout=layout, max_requests=1)

    def layer(comm, x, topk_ids, weights, factors):
        _, earlier = comm.dispatch(jnp.ones_like(x), topk_ids, jnp.ones_like(weights))
        out, handle = comm.dispatch_async(x, None, weights, previous_handle=earlier).wait()
        halves = comm.combine_async(suite.apply_experts(out, factors), handle).wait()
        out, handle = comm.dispatch(x, None, weights, previous_handle=earlier)
        return halves, comm.combine(suite.apply_experts(out, factors), handle)

    check_two_ways(native_implementation, case, layer, suite.assert_same)


def in_order(*arrays):
    """What follows from any of these comes after all of them."""
    return jax.lax.optimization_barrier(arrays)


@MODES
def test_two_requests_in_flight_around_a_whole_op(native_implementation, mode, layout):
    case = small_case(native_implementation, mode=mode, layout=layout, max_requests=2)

    def layer(comm, x, topk_ids, weights, factors):
        def routing(step):
            return jnp.roll(topk_ids, step, 0), jnp.roll(weights, step, 0)

        def experts(out):
            return suite.apply_experts(out, factors)

        first = comm.dispatch_async(x, *routing(0))
        first, later = in_order(first, x)
        second = comm.dispatch_async(2 * later, *routing(1))
        first, second, later = in_order(first, second, later)
        out, handle = comm.dispatch(4 * later, *routing(2))
        first, second, between = in_order(first, second, experts(out))
        (second, second_handle), (first, first_handle) = second.wait(), first.wait()
        first = comm.combine_async(experts(first), first_handle)
        second = comm.combine_async(experts(second), second_handle)
        first, second, between = in_order(first, second, between)
        first, second, between = in_order(first, second, comm.combine(between, handle))
        halves = second.wait() + first.wait() + between
        return halves, sum(suite.whole(comm, (1 << step) * x, *routing(step), factors) for step in range(3))

    check_two_ways(native_implementation, case, layer)


@MODES
def test_a_request_is_carried_through_a_scan(native_implementation, mode, layout):
    """Each step starts the next one's dispatch before it waits for its own."""
    case = small_case(native_implementation, mode=mode, layout=layout, max_requests=2)

    def layer(comm, x, topk_ids, weights, factors):
        def of_step(step):
            return (1 + step) * x, jnp.roll(topk_ids, step, 0), jnp.roll(weights, step, 0)

        def finish(request):
            out, handle = request.wait()
            return comm.combine(suite.apply_experts(out, factors), handle)

        def body(request, arrays):
            following, request = in_order(comm.dispatch_async(*arrays), request)
            return following, finish(request)

        steps = [of_step(step) for step in range(4)]
        later = jax.tree.map(lambda *arrays: jnp.stack(arrays), *steps[1:])
        last, combined = jax.lax.scan(body, comm.dispatch_async(*steps[0]), later)
        return combined.sum(0) + finish(last), sum(suite.whole(comm, *arrays, factors) for arrays in steps)

    check_two_ways(native_implementation, case, layer)


@MODES
def test_halves_in_a_scan_with_remat(native_implementation, mode, layout):
    case = small_case(native_implementation, mode=mode, layout=layout)
    mesh = suite.make_mesh(native_implementation, case.num_ranks)
    halves, whole = (
        programs.scan_layers(native_implementation, mesh, dataclasses.replace(case, max_requests=max_requests), 3)
        for max_requests in (1, 0)
    )
    programs.assert_close(halves, whole)


@MODES
def test_overflow_of_halves(native_implementation, mode, layout):
    check_overflow(native_implementation, mode, layout, max_requests=1)


def forward_of(comm, layer):
    """`layer(x, topk_ids, weights)`, compiled."""
    tokens = P(comm.mesh.axis_names)
    return jax.jit(jax.shard_map(layer, mesh=comm.mesh, in_specs=(tokens,) * 3, out_specs=tokens))


def test_what_is_not_waited_for_is_not_started(native_implementation):
    case = small_case(native_implementation, max_requests=2)
    with suite.communicator(
        native_implementation, suite.make_mesh(native_implementation, case.num_ranks), case
    ) as comm:

        def layer(x, topk_ids, weights):
            comm.dispatch_async(2 * x, topk_ids, weights)
            out, handle = comm.dispatch_async(x, topk_ids, weights).wait()
            comm.combine_async(out.tokens, handle)
            return out.tokens

        inputs = suite.place(suite.draw(case), comm.mesh, comm.capacity)
        text = forward_of(comm, layer).lower(inputs.x, inputs.topk_ids, inputs.weights).compile().as_text()
        ops = "dispatch_start", "dispatch", "combine_start"
        assert [text.count(f'custom_call_target="jax_ep_{op}"') for op in ops] == [1, 1, 0]


@MODES
def test_more_requests_than_may_be_in_flight_and_one_waited_for_twice(native_implementation, mode, layout):
    """What is not there to be received is done as a whole."""
    case = small_case(native_implementation, mode=mode, layout=layout, max_requests=1)

    def layer(comm, x, topk_ids, weights, factors):
        def finish(request):
            out, handle = request.wait()
            return comm.combine(suite.apply_experts(out, factors), handle)

        first = comm.dispatch_async(x, topk_ids, weights)
        first, later = in_order(first, x)
        second = comm.dispatch_async(2 * later, jnp.roll(topk_ids, 1, 0), weights)
        first, second = in_order(first, second)
        once, first = in_order(finish(first), first)
        halves = once + finish(second) + finish(first)
        whole = suite.whole(comm, 2 * x, jnp.roll(topk_ids, 1, 0), weights, factors)
        return halves, 2 * suite.whole(comm, x, topk_ids, weights, factors) + whole

    check_two_ways(native_implementation, case, layer)


@MODES
def test_a_request_from_outside_of_what_is_recomputed(native_implementation, mode, layout):
    """The backward pass waits for it once more."""
    case = small_case(native_implementation, mode=mode, layout=layout, max_requests=2)

    def layer(comm, x, topk_ids, weights, factors):
        @jax.checkpoint
        def finish(request):
            out, handle = request.wait()
            return jnp.sin(comm.combine(suite.apply_experts(out, factors), handle))

        halves = finish(comm.dispatch_async(x, topk_ids, weights))
        return halves, jnp.sin(suite.whole(comm, x, topk_ids, weights, factors))

    check_two_ways(native_implementation, case, layer)


# Larger programs.


def test_two_layers_in_flight(native_implementation):
    mesh = suite.make_mesh(native_implementation, suite.num_ranks_at_most(native_implementation, 4))
    programs.check_many_branches(native_implementation, mesh, num_branches=4, times=2)


def test_many_calls_in_flight_among_native_collectives(native_implementation):
    mesh = suite.make_mesh(native_implementation, suite.num_ranks_at_most(native_implementation, 8))
    programs.check_many_branches(native_implementation, mesh)


@ARRANGEMENTS
def test_scan_with_remat(native_implementation, mode, layout):
    case = small_case(native_implementation, mode=mode, layout=layout)
    programs.check_scan(native_implementation, suite.make_mesh(native_implementation, case.num_ranks), case)


def test_replayed_programs(native_implementation):
    """Also as command buffers, which XLA captures on GPUs once it has run a program a few times."""
    case = small_case(native_implementation, num_tokens=12, topk=4)
    mesh = suite.make_mesh(native_implementation, case.num_ranks)
    first, *others = suite.run(native_implementation, mesh, case, times=20)
    for other in others:
        suite.assert_same(
            suite.repeatable(native_implementation, other), suite.repeatable(native_implementation, first)
        )
