"""The benchmark measures what it says, and its command runs to its end, in one process and in several."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.bench import baselines, comparisons, experts, report, rows, stages, stock, stress, timing, verify
from jax_ep.bench.__main__ import Run
from jax_ep.bench.layer import Layer, Received
from jax_ep.bench.ops import all_ops, num_ops
from jax_ep.bench.problem import Problem
from jax_ep.bench.results import Baseline, Ceilings, Product, Row, Times, fastest
from jax_ep.bench.workloads import WORKLOADS, Traffic, Workload

TINY, TINY_DECODE = WORKLOADS["tiny"], WORKLOADS["tiny-decode"]
THREE_EXPERTS = dataclasses.replace(TINY, topk=3)
NUM_RANKS = 4
NUM_CALLS = 5
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def mesh():
    return suite.make_mesh("cpu", NUM_RANKS, axis_type=jax.sharding.AxisType.Auto)


@pytest.fixture(scope="module")
def problem(mesh):
    with Problem(TINY, mesh) as problem:
        yield problem


@pytest.fixture(scope="module")
def decode_problem(mesh):
    with Problem(TINY_DECODE, mesh) as problem:
        yield problem


@pytest.fixture(params=["high_throughput", "low_latency"])
def either_problem(request):
    return request.getfixturevalue("problem" if request.param == "high_throughput" else "decode_problem")


# What is timed.


def compiled_texts(mesh, fn, changing, fixed, **how) -> tuple[str, str, int]:
    one, many = (timing.compile_chain(fn, mesh, changing, fixed, calls, **how).as_text() for calls in (1, NUM_CALLS))
    return one, many, max(leaf.nbytes for leaf in jax.tree.leaves((changing, fixed))) // mesh.size


def test_chain_makes_every_call_and_no_copies(either_problem, mesh):
    ops = all_ops(either_problem)
    assert len(ops) == num_ops(either_problem.workload)
    for op in ops:
        how = dict(kept=op.kept, feeds_back=op.feeds_back)
        one, many, operand_bytes = compiled_texts(mesh, op.fn, op.changing, op.fixed, **how)
        assert timing.count_calls(one, timing.OUR_CALLS) == op.num_calls, op.name
        assert timing.count_calls(many, timing.OUR_CALLS) == NUM_CALLS * op.num_calls, op.name
        assert timing.count_copies(many, operand_bytes // 16) == 0, op.name


def test_chain_makes_every_collective(problem, mesh):
    dense, *_ = all_pipelines(problem)

    def forward(changing, x):
        return dense.combine(*dense.dispatch(x, *changing))

    one, many, _ = compiled_texts(mesh, forward, (problem.topk_ids, problem.weights), (problem.x,))
    # Labels, and tokens there and back.
    assert timing.count_calls(one, timing.COLLECTIVES) == 3
    assert timing.count_calls(many, timing.COLLECTIVES) == 3 * NUM_CALLS


def test_what_a_low_latency_dispatch_received_does_not_outlive_it(decode_problem, mesh):
    for op in all_ops(decode_problem)[:2]:
        compiled = timing.compile_chain(op.fn, mesh, op.changing, op.fixed, NUM_CALLS, kept=op.kept)
        local_experts = (TINY_DECODE.num_experts,)
        assert [out.shape for out in jax.tree.leaves(compiled.out_info)] == [local_experts] * NUM_CALLS


def test_feeding_back_is_calling_again(decode_problem, mesh):
    op = next(op for op in all_ops(decode_problem) if op.name == "forward")
    assert op.feeds_back
    (got,) = timing.compile_chain(op.fn, mesh, op.changing, op.fixed, 3, feeds_back=True)((op.changing,), op.fixed)
    want = op.changing
    for _ in range(3):
        want = decode_problem.map(op.fn, want, *op.fixed)
    assert verify.num_different(got, want) == 0
    verify.Expected(decode_problem).check_sums(got)


def test_short_calls_are_many(mesh, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    made = []

    def program_of(calls):
        made.append(calls)

        def run():
            clock.now += calls * 1e-4

        return run

    _, calls, per_program = timing._long_enough(program_of, 4, 512, 2, mesh)
    assert made == [4, 52] and calls == 52 and per_program == pytest.approx(52e-4)
    assert timing._long_enough(program_of, 4, 10, 2, mesh)[1] == 10
    assert timing._long_enough(program_of, 100, 512, 2, mesh)[1] == 100


def test_merged_calls_are_refused(problem, mesh):
    op = all_ops(problem)[0]

    def all_equal(changing, *fixed):
        return [op.fn(changing, *fixed) for _ in range(NUM_CALLS)]

    one = timing.compile_chain(op.fn, mesh, op.changing, op.fixed, 1).as_text()
    merged = timing.compile_chain(all_equal, mesh, op.changing, op.fixed, 1).as_text()
    with pytest.raises(timing.UnexpectedProgram, match="expected 5 x 1 calls in the compiled program, got 1"):
        timing.check_chain(one, merged, NUM_CALLS, timing.OUR_CALLS, op.num_calls, 1)
    with pytest.raises(timing.UnexpectedProgram, match="expected 3 calls in the compiled program, got 1"):
        timing.check_chain(one, merged, NUM_CALLS, timing.OUR_CALLS, 3, 1)


def test_added_copies_are_refused():
    copy = "  %copy.1 = bf16[4096,7168]{1,0} copy(%a)\n  %copy-start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%b)\n"
    assert timing.count_copies(copy, 33) == 1
    assert timing.count_copies(copy, 32) == 2
    with pytest.raises(timing.UnexpectedProgram, match="expected at most 0 copies of large operands, got 1"):
        timing.check_chain("", copy, 2, None, None, 4096)


def test_times():
    times = Times([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (times.median, times.spread, times.interquartile_range) == (3.0, 2 / 3, 2 / 3)


def test_traffic():
    workload = Workload("by hand", num_tokens=2, hidden_size=4, num_experts=4, topk=2)
    # Rank 0 has experts 0 and 1.
    routing = np.array([[0, 1], [1, 2], [3, 2], [0, 3]], np.int32)
    assert Traffic.of(workload, routing, 2) == Traffic(
        rows_over_link=1, rows_received=4, tokens_received=3, rows_per_pair=3, tokens_per_pair=2
    )


def test_floors_and_fastest():
    ceilings = Ceilings(copy_bytes_per_s=1e9, store_bytes_per_s=1e8, flag_round_trip_s=None, errors={})
    assert ceilings.floor_s(Row("a", None, None, link_bytes=100, local_bytes=2000)) == 2e-6
    assert ceilings.floor_s(Row("a", None, None, link_bytes=100, local_bytes=200)) == 1e-6
    assert Ceilings(None, None, None, {}).floor_s(Row("a", None, None, 1, 1)) is None
    low_latency = Row("a", None, None, link_bytes=100, local_bytes=200, flag_round_trips=1)
    assert ceilings.floor_s(low_latency) == 2e-7  # by the copy alone: no link floor without its flags
    assert dataclasses.replace(ceilings, flag_round_trip_s=2e-6).floor_s(low_latency) == 3e-6
    slow, quick = (Baseline("forward", name, {}, Times([t] * 3)) for name, t in (("slow", 2.0), ("quick", 1.0)))
    assert fastest([slow, quick, Baseline("forward", "none", {}, None, "failed")], "forward") == quick


# Stock JAX.


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What jax.lax.ragged_all_to_all is documented to do, which XLA's CPU backend does not."""
    operands, begins, sizes, places, expected = (
        lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets, recv_sizes)
    )
    me, row = lax.axis_index(axis_name), jnp.arange(output.shape[0], dtype=jnp.int32)
    for source in range(operands.shape[0]):
        # It is undefined where both sides do not agree, so give what nobody takes for a result.
        agreed = sizes[source, me] == expected[me, source]
        i = row - places[source, me]
        index = jnp.clip(begins[source, me] + i, 0, operand.shape[0] - 1)
        values = jnp.where(agreed, jnp.take(operands[source], index, axis=0), jnp.asarray(99, operand.dtype))
        output = jnp.where(((i >= 0) & (i < sizes[source, me]))[:, None], values, output)
    return output


def all_pipelines(problem) -> list[stock.Pipeline]:
    return baselines.pipelines(problem.workload, problem.traffic, problem.capacity, problem.num_ranks)


def layer_and_gradients(problem, dispatch_and_combine, topk_ids):
    """Of a layer that is not linear, so that gradients depend on what arrives."""

    @jax.jit
    @functools.partial(jax.shard_map, mesh=problem.mesh, in_specs=P("ep"), out_specs=P("ep"))
    def run(x, topk_ids, weights):
        layer = functools.partial(dispatch_and_combine, topk_ids=topk_ids)
        out, pull, received = jax.vjp(lambda x, w: layer(x=x, weights=w), x, weights, has_aux=True)
        return out, pull(x), received

    return run(problem.x, topk_ids, problem.weights)


@pytest.mark.parametrize("i", range(4), ids=["dense-rank", "dense-k", "ragged-rank", "ragged-k"])
def test_stock_pipelines(mesh, monkeypatch, i):
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    with Problem(THREE_EXPERTS, mesh, jnp.float32) as problem:
        topk_ids = THREE_EXPERTS.routing(NUM_RANKS)
        topk_ids[np.random.default_rng(0).random(topk_ids.shape) < 0.125] = -1
        topk_ids = problem.shard(topk_ids)
        pipeline, comm = all_pipelines(problem)[i], problem.communicator(implementation="reference")

        def by_stock(x, topk_ids, weights):
            tokens, plan, weights = pipeline.dispatch(x, topk_ids, weights)
            return pipeline.combine(jnp.tanh(tokens), plan, weights), (tokens, plan.num_tokens_per_expert)

        def by_reference(x, topk_ids, weights):
            out, handle = comm.dispatch(x, topk_ids, weights)
            return comm.combine(jnp.tanh(out.tokens), handle), (out.tokens, out.layout.num_tokens_per_expert)

        out, gradients, received = layer_and_gradients(problem, by_stock, topk_ids)
        want_out, want_gradients, want_received = layer_and_gradients(problem, by_reference, topk_ids)
        jax.tree.map(np.testing.assert_array_equal, received, want_received)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, (out, gradients), (want_out, want_gradients))


def test_verification_finds_wrong_results(problem):
    x = problem.x
    assert verify.num_different(x, x) == 0
    assert verify.num_different(x.at[3, 5].multiply(1.01), x) == 1
    assert verify.num_different(x.at[3, 5].multiply(1.01), x, roundings=8) == 0
    assert verify.num_different(x.at[3, 5].multiply(1.2), x, roundings=8) == 1
    assert verify.num_different(x.at[3, 5].set(jnp.nan), x, roundings=8) == 1
    with pytest.raises(verify.WrongResult, match="combine: 1 of 16384 elements are wrong"):
        verify.expect_close("combine", x.at[3, 5].set(0), x)


def low_latency_junk(received: Received) -> Received:
    """The same with NaN in all slots that hold no token."""

    def on_each_rank(received):
        tokens = received.tokens
        holds_token = jnp.arange(tokens.shape[1], dtype=jnp.int32) < received.num_tokens_per_expert[:, None]
        return received._replace(tokens=jnp.where(holds_token[..., None], tokens, jnp.nan).astype(tokens.dtype))

    spec = P("ep")
    mesh = received.tokens.sharding.mesh
    return jax.jit(jax.shard_map(on_each_rank, mesh=mesh, in_specs=spec, out_specs=spec))(received)


def test_every_row_is_verified(either_problem):
    expected, not_verified = verify.Expected(either_problem), {"dispatch backward", "combine backward"}
    for op in all_ops(either_problem):
        if op.name in not_verified:
            continue
        out = either_problem.map(op.fn, op.changing, *op.fixed)
        op.verify(expected, out)
        if op.kept is not None:
            out = low_latency_junk(out)
            op.verify(expected, out)
        with pytest.raises(verify.WrongResult):
            op.verify(expected, jax.tree.map(lambda a: jnp.roll(a, 1, axis=-1 if a.ndim < 3 else 1), out))


def test_halves_with_wrong_results_fail(decode_problem, monkeypatch):
    wait = jax_ep.CombineRequest.wait
    monkeypatch.setattr(jax_ep.CombineRequest, "wait", lambda request: wait(request) * 1.2)
    with Problem(TINY_DECODE, decode_problem.mesh, max_requests=1) as problem:
        errors = [comparison.error for comparison in comparisons.measure_halves(problem)]
    assert errors[:7] == [None] * 7 and all("WrongResult: combine" in error for error in errors[7:])


def test_rows_with_wrong_results_fail(decode_problem, monkeypatch):
    monkeypatch.setattr(Layer, "forward_of", lambda layer, x, topk_ids, weights: x * 1.2)
    expected, (op, *_) = verify.Expected(decode_problem), (o for o in all_ops(decode_problem) if o.name == "forward")
    row = rows.measure_op(decode_problem, op, expected)
    assert row.times is None and "WrongResult: combine" in row.error


def test_baselines_that_fail_are_reported(problem):
    keys = []
    measured = dict(
        baselines.measure_baselines(problem, sweep=False, only="nothing", begin=lambda c: keys.append(c.key))
    )
    assert list(measured) == keys
    assert [baseline.error for baseline in measured.values()] == [None, None, *["not available on cpu"] * 2]
    configuration = baselines.Configuration(all_pipelines(problem)[0], "forward", "none", {"xla_no_such_flag": True})
    failed = baselines._measure(problem, verify.Expected(problem), configuration)
    assert (failed.times, failed.error) == (None, "unknown flag")


# Stress.


@pytest.mark.parametrize("workload", [TINY, TINY_DECODE], ids=lambda workload: workload.name)
def test_stress_finds_wrong_results(mesh, monkeypatch, workload):
    def run_stress(mesh, num_rounds: int):
        *_, last = stress.run_stress(workload, mesh, num_rounds)
        return last

    right = run_stress(mesh, 60)
    assert (right.rounds, right.wrong_sums, right.wrong_rows) == (60, 0, 0)
    dispatch, combine = jax_ep.MoECommunicator.dispatch, jax_ep.MoECommunicator.combine

    def misplaced(comm, *args, **kwargs):
        out, handle = dispatch(comm, *args, **kwargs)
        return dataclasses.replace(out, tokens=jnp.roll(out.tokens, 1, axis=out.tokens.ndim - 2)), handle

    with monkeypatch.context() as patched:
        patched.setattr(jax_ep.MoECommunicator, "combine", lambda *args: combine(*args).at[0, 0].add(1))
        wrong = run_stress(mesh, 10)
        assert (wrong.wrong_sums, wrong.wrong_rows) == (10, 0)
    monkeypatch.setattr(jax_ep.MoECommunicator, "dispatch", misplaced)
    assert run_stress(mesh, 10).wrong_rows > 5


def test_low_latency_stress_draws_distinct_experts_and_idle_ranks(mesh):
    draw = jax.shard_map(
        lambda index: stress._draw(TINY_DECODE, index).topk_ids, mesh=mesh, in_specs=P(), out_specs=P("ep")
    )
    draws = np.stack([np.asarray(jax.jit(draw)(index)) for index in range(20)])
    draws = draws.reshape(20, NUM_RANKS, TINY_DECODE.num_tokens, TINY_DECODE.topk)
    assert draws.min() == -1 and TINY_DECODE.num_experts > draws.max() > TINY_DECODE.num_experts // 2
    first, second = draws[..., 0], draws[..., 1]
    assert not ((first == second) & (first >= 0)).any()
    is_idle = (draws == -1).all((2, 3))
    assert 0 < is_idle.mean() < 0.5 and len(np.unique((draws >= 0).any(-1).sum(-1))) > 5


# The experts' grouped matrix product.


@pytest.fixture(scope="module")
def tiny_experts():
    return experts.Experts(suite.make_mesh("cpu", 1, axis_type=jax.sharding.AxisType.Auto), TINY, 4)


def test_sizes_of_groups():
    assert experts.even_groups(10, 4).tolist() == [2, 3, 2, 3]
    skewed = experts.skewed_groups(1000, 4, 1.0)
    assert skewed.sum() == 1000 and 400 < skewed.max() < 560 and 60 < skewed.min() < 180


def test_verification_of_products_is_a_loop_over_groups():
    rng, sizes = np.random.default_rng(0), np.array([4, 0, 5], np.int32)
    x, kernels, gradients = (rng.normal(size=size).astype(jnp.bfloat16) for size in ((12, 8), (3, 8, 5), (12, 5)))
    right = tuple(np.full_like(like, np.nan) for like in (gradients, x, kernels))
    for i, (start, end) in enumerate(((0, 4), (4, 4), (4, 9))):
        rows, kernel, gradient = (a.astype(np.float64) for a in (x[start:end], kernels[i], gradients[start:end]))
        right[0][start:end] = rows @ kernel
        right[1][start:end] = gradient @ kernel.T
        right[2][i] = rows.T @ gradient
    operands = x, kernels, gradients, sizes

    def num_wrong(results) -> int:
        return int(experts.num_wrong(results, *operands, largest_group=5))

    assert num_wrong(right) == num_wrong(right[:1]) == 0
    for result, index, change in ((0, (8, 4), 0.3), (0, (0, 0), np.nan), (1, (4, 7), 0.3), (2, (1, 0, 0), 1e-3)):
        wrong = tuple(a.copy() for a in right)
        wrong[result][index] += np.asarray(change, jnp.bfloat16)
        assert num_wrong(wrong) == 1
    assert num_wrong((np.roll(right[0], 1, axis=0),)) > 30


def test_products_with_tokamax(tiny_experts, monkeypatch):
    matmul = pytest.importorskip("jax_ep.nn._matmul")
    fake = types.ModuleType("tokamax")
    fake.ragged_dot = lax.ragged_dot
    fake.ragged_dot_general = lax.ragged_dot_general
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    matmul._has_tokamax.cache_clear()
    try:
        assert experts.backends() == {
            "jax.lax.ragged_dot": lax.ragged_dot,
            "tokamax.ragged_dot": matmul._tokamax_ragged_dot,
        }
        dense, *products = experts.measure_experts(tiny_experts, "tokamax.ragged_dot, even groups, forward + backward")
    finally:
        matmul._has_tokamax.cache_clear()
    (product,) = products
    assert (dense.name, dense.error, dense.dense_times) == ("dense matmul, forward + backward", None, None)
    assert (product.error, product.dense_times) == (None, dense.times)
    assert product.flops == dense.flops == 3 * 2 * 128 * 64 * 32
    assert product.flop_per_s == product.flops / product.times.median
    monkeypatch.setitem(sys.modules, "jax_ep.nn._matmul", None)  # as without Flax
    assert list(experts.backends()) == ["jax.lax.ragged_dot"]


@jax.custom_vjp
def sums_rows_beyond_groups(rows, kernels, sizes):
    return lax.ragged_dot(rows, kernels, sizes)


def all_rows_to_the_last(saved, gradients):
    rows, kernels, sizes = saved
    sizes = sizes.at[-1].add(rows.shape[0] - jnp.sum(sizes, dtype=jnp.int32))
    return *jax.vjp(lambda rows, kernels: lax.ragged_dot(rows, kernels, sizes), rows, kernels)[1](gradients), None


sums_rows_beyond_groups.defvjp(lambda *args: (lax.ragged_dot(*args), args), all_rows_to_the_last)


def test_products_with_wrong_results_fail(tiny_experts, monkeypatch):
    def of_the_next_group(rows, kernels, sizes):
        return lax.ragged_dot(rows, jnp.roll(kernels, 1, axis=0), sizes)

    def fails(rows, kernels, sizes):
        raise NotImplementedError("no such kernel\nat all")

    matmuls = dict(next=of_the_next_group, fails=fails, beyond=sums_rows_beyond_groups)
    monkeypatch.setattr(experts, "backends", lambda: matmuls)
    products = {product.name: product for product in experts.measure_experts(tiny_experts, "even")}
    errors = {name: product.error for name, product in products.items()}
    assert "WrongResult" in errors["next, even groups, forward"]
    assert errors["fails, even groups, forward"] == "NotImplementedError: no such kernel"
    assert errors["beyond, even groups, forward"] is None
    assert "WrongResult: beyond" in errors["beyond, even groups, forward + backward"]
    assert errors["dense matmul, forward"] is None and errors["dense matmul, forward + backward"] is None


def test_products_that_fail_are_shown(tiny_experts, capsys):
    run = Run(baseline_timeout_s=1.0)
    run.hear("product", dataclasses.asdict(Product("dense", 10**12, Times([1.0, 2.0, 3.0]), None)))
    assert run.ok
    run.hear("product", dataclasses.asdict(Product("slow", 10**12, Times([4.0]), None, Times([1.0, 2.0, 3.0]))))
    run.hear("product", dataclasses.asdict(Product("wrong", 10**12, None, "WrongResult", Times([2.0]))))
    assert not run.ok
    report.print_products(json.loads(json.dumps(tiny_experts.description)), run.measured["product"])
    lines = capsys.readouterr().out.splitlines()
    assert "128 rows of 64, in an array of 256, times 4 kernels of 64 x 32" in lines[0] and "of 32 to 32" in lines[0]
    cells = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert cells["dense"] == ["2000000.0", "50.0%", "0.5", "-"]
    assert cells["slow"] == ["4000000.0", "0.0%", "0.25", "2.00"]
    assert cells["wrong"] == ["-"] * 4
    assert "wrong: failed: WrongResult" in lines


# Stages.

FAKE_WORKER = """
import json, os, signal, sys, time
stage = json.loads(sys.argv[1])
def say(kind, **content):
    os.write(stage["events"], (json.dumps([kind, content]) + "\\n").encode())
for key in ["fine", "crashes", "hangs", "last"]:
    if key not in stage["known"]:
        say("configuration", key=key, if_failed=dict(op=key))
        if key == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if key == "hangs":
            time.sleep(1000)
        say("baseline", key=key, baseline=dict(op=key))
"""


def test_baselines_that_crash_or_hang_do_not_end_the_run(monkeypatch):
    monkeypatch.setattr(stages, "_WORKER", [sys.executable, "-c", FAKE_WORKER])
    heard = {}

    def hear(kind, content):
        if kind == "baseline":
            heard[content["key"]] = content["baseline"].get("error")

    stages.run_resiliently(stages.Stage("baselines", "tiny"), hear, timeout_s=60, silence_s=4)
    assert heard == dict(fine=None, crashes="process 0 ended with status -11", hangs="nothing heard for 4 s", last=None)


def test_stage_that_fails_shows_its_log(monkeypatch):
    monkeypatch.setattr(stages, "_WORKER", [sys.executable, "-c", "import sys; sys.exit('no such device')"])
    with pytest.raises(stages.StageFailed, match="process 0 ended with status 1\nno such device"):
        list(stages.run_stage(stages.Stage("ours", "tiny"), timeout_s=60))


# The command.


def start_bench(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "jax_ep.bench", "--workload", "tiny", *map(str, arguments)],
        env=os.environ | dict(JAX_PLATFORMS="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_bench(*arguments) -> str:
    process = start_bench(*arguments)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def test_command(tmp_path):
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    output = run_bench("--devices", 2, "--comparisons", "--json", file, "--plot", picture)
    for text in ("Ceilings: copy", "x floor", "times faster", "against", "failed: not available on cpu"):
        assert text in output
    results = json.loads(file.read_text())
    assert [summary["row"]["error"] for summary in results["rows"]] == [None] * 8
    assert [bool(summary["best_stock"]) for summary in results["rows"]].count(True) == 4
    assert [comparison["error"] for comparison in results["comparisons"]] == [None] * 20
    assert {baseline["op"] for baseline in results["baselines"].values() if baseline["times"]} == {
        "forward",
        "dispatch",
        "combine",
        "forward + backward",
    }
    assert results["environment"]["devices"] == "2x cpu" and results["problem"]["implementation"] == "cpu"
    assert results["ceilings"]["copy_bytes_per_s"] > 0 and results["command"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_in_low_latency_mode(tmp_path):
    file = tmp_path / "out.json"
    output = run_bench("--workload", "tiny-decode", "--devices", 2, "--comparisons", "--json", file)
    assert "low latency, output [8, 32, 64] per rank" in output and "forward, 1 token per rank" in output
    results = json.loads(file.read_text())
    assert [summary["row"]["error"] for summary in results["rows"]] == [None] * 6
    between = "elementwise between its halves"
    assert [(comparison["name"], comparison["beside"]) for comparison in results["comparisons"]] == [
        ("elementwise alone", ""),
        ("dispatch, fresh routing, alone", ""),
        ("dispatch, fresh routing, then elementwise", ""),
        (f"dispatch, fresh routing, {between}", "one after the other"),
        (f"dispatch, fresh routing, {between}", "the longer alone"),
        ("combine, weighted, alone", ""),
        ("combine, weighted, then elementwise", ""),
        (f"combine, weighted, {between}", "one after the other"),
        (f"combine, weighted, {between}", "the longer alone"),
        ("forward, no command buffers", ""),
        ("forward, command buffers as by default", "without"),
    ]
    assert [comparison["error"] for comparison in results["comparisons"]] == [None] * 11
    assert "forward + backward" not in {baseline["op"] for baseline in results["baselines"].values()}
    output = run_bench("--workload", "tiny-decode", "--devices", 2, "--stress", 20)
    assert "0 with wrong sums, 0 with wrong rows" in output


def test_command_with_two_processes(tmp_path):
    file = tmp_path / "out.json"
    run_bench("--devices", 4, "--processes", 2, "--only", "dispatch, fresh", "--json", file)
    results = json.loads(file.read_text())
    assert [summary["row"]["error"] for summary in results["rows"]] == [None]
    assert results["environment"]["processes"] == "2" and results["environment"]["devices"] == "4x cpu"
    errors = [baseline["error"] for baseline in results["baselines"].values()]
    # How many pipelines are worth timing further depends on their times.
    assert errors[:4] == [None, None, *["not available on cpu"] * 2] and set(errors[4:]) == {None}
    output = run_bench("--devices", 4, "--processes", 2, "--stress", 20)
    assert "20 rounds of dispatch and combine" in output and "0 with wrong sums, 0 with wrong rows" in output


def test_command_for_experts(tmp_path):
    file = tmp_path / "out.json"
    output = run_bench("--experts", 2, "--only", "even", "--json", file)
    assert "2 kernels of 64 x 32" in output and "TFLOP/s" in output
    results = json.loads(file.read_text())
    assert results["experts"]["group_sizes"]["even"] == [64, 64] and not results["rows"] and not results["baselines"]
    assert [summary["product"]["error"] for summary in results["products"]] == [None] * len(results["products"])
    in_json = {summary["product"]["name"]: summary["times_dense"] for summary in results["products"]}
    for direction in ("forward", "forward + backward"):
        assert in_json[f"jax.lax.ragged_dot, even groups, {direction}"] > 0
        assert in_json[f"dense matmul, {direction}"] is None


def test_workers_do_not_outlive_the_command():
    process = start_bench("--devices", 2, "--processes", 2, "--stress", 10**9)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while len(pids := children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2 and not any(is_running(pid) for pid in pids)


def is_running(pid: str) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_tables():
    assert report.format_table(["op", "us"], [["a", "1.0"], ["long", "10.0"]]).splitlines() == [
        "op      us",
        "----  ----",
        "a      1.0",
        "long  10.0",
    ]
