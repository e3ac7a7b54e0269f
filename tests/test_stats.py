"""Load statistics against a loop in numpy, their picture, and the ops' names in compiled programs."""

from __future__ import annotations

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from suite import EXPERT_MAJOR, FLAT, LOW_LATENCY, RANK_MAJOR, Case

import jax_ep

CASES = [
    Case(2, routing="skewed", expert_alignment=4),
    Case(2, routing="skewed", layout=RANK_MAJOR),
    Case(2, routing="skewed", mode=LOW_LATENCY, layout=EXPERT_MAJOR),
    Case(2, routing="uniform", mode=LOW_LATENCY, layout=FLAT),
    Case(2, routing="uniform", mode=LOW_LATENCY, layout=RANK_MAJOR, capacity=5, overflow="drop"),
    Case(2, routing="skewed", capacity=7, overflow="drop"),
    Case(2, routing="single", mode=LOW_LATENCY, layout=EXPERT_MAJOR, overflow="drop"),
    Case(2, routing="empty", layout=RANK_MAJOR),
    Case(2, routing="empty", mode=LOW_LATENCY, layout=EXPERT_MAJOR),
]


def case_id(case: Case) -> str:
    drops = ["drops"] if case.overflow == "drop" else []
    return "-".join([suite.arrangement_id(case.mode), case.layout.value, case.routing, *drops])


def expected(case: Case, topk_ids: np.ndarray, capacity: int):
    """Tokens per expert [E], rows per rank [R], dropped per rank [R], by placing one row after the other."""
    num_local = case.num_experts // case.num_ranks
    tokens, rows, dropped = (
        np.zeros(case.num_experts, int),
        np.zeros(case.num_ranks, int),
        np.zeros(case.num_ranks, int),
    )
    for rank in range(case.num_ranks):
        local = range(rank * num_local, (rank + 1) * num_local)
        if case.layout is RANK_MAJOR:
            groups = [[experts] for ids in topk_ids if (experts := [e for e in ids if e in local])]
            limit = capacity
        else:
            groups = [[[e]] * int((topk_ids == e).sum()) for e in local]
            limit = capacity if case.layout is FLAT else capacity // num_local
        row = 0
        for group in groups:
            row = 0 if case.layout is EXPERT_MAJOR else -(-row // case.expert_alignment) * case.expert_alignment
            for experts in group:
                if row < limit:
                    rows[rank] += 1
                    np.add.at(tokens, experts, 1)
                else:
                    dropped[rank] += 1
                row += 1
    return tokens, rows, dropped


def imbalance(counts: np.ndarray) -> float:
    return counts.max() / counts.mean() if counts.any() else 1.0


def statistics_program(comm, by_handle: bool = False, check_vma: bool = True):
    """Jitted: the statistics, and each rank's own part of them."""

    def on_each_rank(x, topk_ids, weights):
        out, handle = comm.dispatch(x, topk_ids, weights)
        stats = jax_ep.load_statistics(handle if by_handle else out)
        mine = stats.of_rank(jax.lax.axis_index("ep"))
        return stats, jax.tree.map(lambda a: a[None], mine)

    mapped = jax.shard_map(
        on_each_rank, mesh=comm.mesh, in_specs=P(comm.mesh.axis_names), out_specs=(P(), P("ep")), check_vma=check_vma
    )
    return jax.jit(mapped)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_statistics(native_implementation, case):
    check_statistics(native_implementation, case)


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[5]], ids=case_id)
def test_statistics_of_the_reference(case):
    check_statistics("reference", case)


def check_statistics(implementation: str, case: Case) -> None:
    mesh = suite.make_mesh(implementation, case.num_ranks)
    by_handle = case.routing == "skewed"
    with suite.communicator(implementation, mesh, case) as comm:
        inputs = suite.place(suite.draw(case), mesh, comm.capacity)
        program = statistics_program(comm, by_handle, check_vma=not by_handle)
        stats, mine = jax.block_until_ready(program(inputs.x, inputs.topk_ids, inputs.weights))
        comm.check()
        tokens, rows, dropped = expected(case, np.asarray(inputs.topk_ids), comm.capacity)
    assert (dropped.sum() > 0) == (case.overflow == "drop")
    np.testing.assert_array_equal(stats.tokens_per_expert, tokens)
    np.testing.assert_array_equal(stats.rows_per_rank, rows)
    np.testing.assert_array_equal(stats.dropped_per_rank, dropped)
    np.testing.assert_allclose(stats.expert_imbalance, imbalance(tokens), rtol=1e-6)
    np.testing.assert_allclose(stats.rank_imbalance, imbalance(rows), rtol=1e-6)
    np.testing.assert_array_equal(mine.tokens_per_local_expert, tokens.reshape(case.num_ranks, -1))
    np.testing.assert_array_equal(mine.rows, rows)
    np.testing.assert_array_equal(mine.dropped, dropped)
    assert stats.of_rank(1).rows == rows[1]


def test_axis_is_the_communicators():
    mesh = suite.make_mesh("reference", 2, dp=4)
    with suite.communicator("reference", mesh, Case(4), axis_name="dp") as comm:
        topk = comm.config.topk

        def on_each_rank(topk_ids):
            x = jnp.zeros((1, comm.config.hidden_size), comm.config.dtype)
            return jax.tree.map(lambda a: a[None], jax_ep.load_statistics(comm.dispatch(x, topk_ids)[1]))

        mapped = jax.shard_map(on_each_rank, mesh=mesh, in_specs=P(("ep", "dp")), out_specs=P("ep"))
        topk_ids = np.broadcast_to(np.arange(8, dtype=np.int32)[:, None] % comm.config.num_experts, (8, topk))
        topk_ids = jax.device_put(topk_ids, NamedSharding(mesh, P(("ep", "dp"))))
        stats = jax.block_until_ready(jax.jit(mapped)(topk_ids))
    assert stats.rows_per_rank.shape == (2, 4) and (np.sum(stats.rows_per_rank, 1) == 4 * topk).all()


def test_groups_count_by_themselves():
    case = Case(2)
    mesh = suite.make_mesh("reference", 2, dp=2)
    with suite.communicator("reference", mesh, case) as comm:
        inputs = suite.place(suite.draw(case, dp=2), mesh, comm.capacity)

        def on_each_rank(x, topk_ids):
            stats = jax_ep.load_statistics(comm.dispatch(x, topk_ids)[0])
            return jax.tree.map(lambda a: a[None], stats)

        mapped = jax.shard_map(on_each_rank, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P("dp"))
        stats = jax.block_until_ready(jax.jit(mapped)(inputs.x, inputs.topk_ids))
    for group, topk_ids in enumerate(np.split(np.asarray(inputs.topk_ids), 2)):
        got = np.asarray(stats.tokens_per_expert)[group]
        np.testing.assert_array_equal(got, expected(case, topk_ids, comm.capacity)[0])


def test_statistics_beside_gradients(native_implementation):
    case = Case(2, routing="skewed")
    mesh = suite.make_mesh(native_implementation, case.num_ranks)
    with suite.communicator(native_implementation, mesh, case) as comm:
        inputs = suite.place(suite.draw(case), mesh, comm.capacity)

        def on_each_rank(x, topk_ids, weights):
            out, handle = comm.dispatch(x, topk_ids, weights)
            return comm.combine(out.tokens, handle), jax_ep.load_statistics(handle)

        mapped = jax.shard_map(on_each_rank, mesh=mesh, in_specs=P("ep"), out_specs=(P("ep"), P()))

        def loss(x, topk_ids, weights):
            y, stats = jax.checkpoint(mapped)(x, topk_ids, weights)
            return jnp.square(y).sum() + 0 * stats.rank_imbalance, stats

        (_, stats), gradient = jax.block_until_ready(
            jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs.x, inputs.topk_ids, inputs.weights)
        )
    tokens, _, _ = expected(case, np.asarray(inputs.topk_ids), comm.capacity)
    np.testing.assert_array_equal(stats.tokens_per_expert, tokens)
    assert np.isfinite(gradient).all() and np.abs(gradient).sum() > 0


def test_bad_arguments():
    with pytest.raises(TypeError, match="received: expected a DispatchOutput or a DispatchHandle, got tuple"):
        jax_ep.load_statistics(())
    layout = jax_ep.DispatchLayoutInfo(FLAT, jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32), "ep")
    out = jax_ep.DispatchOutput(jnp.zeros((1, 1)), layout, jnp.zeros((), jnp.int32))
    with pytest.raises(ValueError, match="load_statistics: expected a call inside jax.shard_map over mesh axis 'ep'"):
        jax_ep.load_statistics(out)


# The picture.


STATISTICS = jax_ep.LoadStatistics(
    np.array([4, 0, 1, 3], np.int32), np.array([4, 4], np.int32), np.array([0, 2], np.int32), 2.0, 1.0
)


def test_picture(tmp_path):
    for name, stats in dict(
        drops=STATISTICS, none=dataclasses.replace(STATISTICS, dropped_per_rank=np.zeros(2))
    ).items():
        jax_ep.plot_load(stats, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_load: needs matplotlib, which is not installed: pip install"):
        jax_ep.plot_load(STATISTICS, tmp_path / "out.png")


# Names in profiles and in HLO metadata.


@pytest.mark.parametrize("max_requests", [0, 1], ids=["whole", "halves"])
def test_ops_are_named(native_implementation, max_requests):
    case = Case(2, max_requests=max_requests)
    mesh = suite.make_mesh(native_implementation, case.num_ranks)
    with suite.communicator(native_implementation, mesh, case) as comm:
        inputs = suite.place(suite.draw(case), mesh, comm.capacity)
        lowered = suite.make_step(comm, case).lower(inputs)
        text = lowered.as_text(debug_info=True)
        compiled = lowered.compile().as_text()
    backward = [f"jax_ep.{op}_backward" for op in ("dispatch", "combine")]
    starts = [f"jax_ep.{op}_start" for op in ("dispatch", "combine")] * (max_requests > 0)
    for name in ["jax_ep.dispatch", "jax_ep.combine", *backward, *starts]:
        assert re.search(rf"{re.escape(name)}[/)]", text), name
        assert re.search(rf"{re.escape(name)}[/)]", compiled), name


def test_reference_is_named():
    case = Case(2)
    with suite.communicator("reference", suite.make_mesh("reference", 2), case) as comm:
        inputs = suite.place(suite.draw(case), comm.mesh, comm.capacity)
        text = suite.make_step(comm, case).lower(inputs).as_text(debug_info=True)
    assert '"jax_ep.dispatch/' in text and '"jax_ep.combine/' in text


def test_cached_dispatch_is_named(native_implementation):
    case = Case(2)
    mesh = suite.make_mesh(native_implementation, case.num_ranks)
    with suite.communicator(native_implementation, mesh, case) as comm:
        inputs = suite.place(suite.draw(case), mesh, comm.capacity)

        def twice(x, topk_ids):
            handle = comm.dispatch(x, topk_ids)[1]
            return comm.dispatch(x + 1, previous_handle=handle)[0].tokens

        mapped = jax.shard_map(twice, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        text = jax.jit(mapped).lower(inputs.x, inputs.topk_ids).as_text(debug_info=True)
    assert "jax_ep.dispatch_cached/" in text
