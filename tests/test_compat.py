"""`jax_ep.compat` against the plain API bit for bit, a dense layer, and the published names of arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from suite import EXPERT_MAJOR, FLAT, LOW_LATENCY, RANK_MAJOR, Case

import jax_ep
from jax_ep import CapacityError, ExpertIdError, MoECommunicator, QuantConfig, _quant
from jax_ep.compat import Buffer, Config, EventHandle, EventOverlap, UCCLBuffer, fused_a2a


@pytest.fixture
def mesh(native_implementation) -> Mesh:
    return make_mesh(native_implementation)


@pytest.fixture(autouse=True)
def nothing_is_kept():
    yield
    fused_a2a.free_buffer()
    fused_a2a.reset_hybrid_ep_buffer()
    Buffer.num_sms = None
    if "num_sms" in vars(UCCLBuffer):
        del UCCLBuffer.num_sms


def make_mesh(implementation: str, most: int = 4) -> Mesh:
    return suite.make_mesh(implementation, suite.num_ranks_at_most(implementation, most))


def mapped(mesh: Mesh, f):
    return jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))


# ---- The published names ----

# What they take, in their order, without `self`. Names that are behind `*` there are not told apart.
DISPATCH_LAYOUT = "topk_idx num_experts previous_event async_finish allocate_on_comm_stream"
DISPATCH = (
    "x handle num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert topk_idx "
    "topk_weights expert_alignment num_worst_tokens config previous_event async_finish allocate_on_comm_stream"
)
COMBINE = "x handle topk_weights bias config previous_event async_finish allocate_on_comm_stream"
LOW_LATENCY_DISPATCH = (
    "x topk_idx num_max_dispatch_tokens_per_rank num_experts cumulative_local_expert_recv_stats "
    "dispatch_wait_recv_cost_stats use_fp8 round_scale use_ue8m0 async_finish return_recv_hook"
)
LOW_LATENCY_COMBINE = (
    "x topk_idx topk_weights handle use_logfmt zero_copy async_finish return_recv_hook out combine_wait_recv_cost_stats"
)
RDMA_SIZE_HINT = "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts"
FUSED_DISPATCH = "x token_indices token_probs num_experts group async_finish allocate_on_comm_stream"
FUSED_COMBINE = "x group handle async_finish allocate_on_comm_stream"
BUFFER_SIZES = (
    "group num_nvl_bytes num_rdma_bytes low_latency_mode num_qps_per_rank allow_nvlink_for_low_latency_mode "
    "allow_mnnvl explicitly_destroy"
)
METHODS = {
    "destroy": "",
    "is_sm90_compiled": "",
    "set_num_sms": "new_num_sms",
    "capture": "",
    "get_low_latency_rdma_size_hint": RDMA_SIZE_HINT,
    "get_comm_stream": "",
    "get_local_buffer_tensor": "dtype size offset use_rdma_buffer",
    "get_dispatch_config": "num_ranks",
    "get_combine_config": "num_ranks",
    "get_dispatch_layout": DISPATCH_LAYOUT,
    "dispatch": DISPATCH,
    "combine": COMBINE,
    "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank hidden num_experts",
    "low_latency_dispatch": LOW_LATENCY_DISPATCH,
    "low_latency_combine": LOW_LATENCY_COMBINE,
    "get_next_low_latency_combine_buffer": "handle",
}
PUBLISHED: dict[Any, str] = {
    # github.com/deepseek-ai/DeepEP, deep_ep/buffers/legacy.py at 189df34 (deep_ep/buffer.py before), utils.py at
    # 0fdf4f0; Config is bound in csrc/deep_ep.cpp.
    Buffer: f"{BUFFER_SIZES} enable_shrink comm",
    **{getattr(Buffer, name): arguments for name, arguments in METHODS.items()},
    Buffer.low_latency_update_mask_buffer: "rank_to_mask mask",
    Buffer.low_latency_query_mask_buffer: "mask_status",
    Buffer.low_latency_clean_mask_buffer: "",
    EventOverlap: "event extra_tensors",
    EventHandle: "",
    Config: (
        "num_sms num_max_nvl_chunked_send_tokens num_max_nvl_chunked_recv_tokens num_max_rdma_chunked_send_tokens "
        "num_max_rdma_chunked_recv_tokens"
    ),
    Config.get_nvl_buffer_size_hint: "hidden_bytes num_ranks",
    Config.get_rdma_buffer_size_hint: "hidden_bytes num_ranks",
    # github.com/NVIDIA-NeMo/Automodel, nemo_automodel/components/moe/uccl_ep/buffer.py and _buffer.py at 118bf3b; the
    # latter is github.com/uccl-project/uccl, ep/bench/buffer.py.
    UCCLBuffer: f"{BUFFER_SIZES} is_intranode",
    **{getattr(UCCLBuffer, name): arguments for name, arguments in METHODS.items()},
    UCCLBuffer.reset_rdma_buffer: "",
    UCCLBuffer.connect_atomic_buffer: "proxy",
    # github.com/NVIDIA/Megatron-LM, megatron/core/transformer/moe/fused_a2a.py at 02ad939.
    fused_a2a.get_hidden_bytes: "x",
    fused_a2a.get_buffer: "group hidden_bytes",
    fused_a2a.fused_dispatch: FUSED_DISPATCH,
    fused_a2a.fused_combine: FUSED_COMBINE,
    fused_a2a.set_deepep_num_sms: "num_sms",
    fused_a2a.init_hybrid_ep_buffer: (
        "group hidden_dim num_tokens num_local_experts num_sms_dispatch_api num_sms_combine_api num_blocks_permute "
        "num_blocks_unpermute fp8_dispatch num_sms_preprocessing_api"
    ),
    fused_a2a.reset_hybrid_ep_buffer: "",
    fused_a2a.hybrid_ep_combine: "x handle num_permuted_tokens pad_multiple fused",
    # github.com/NVIDIA-NeMo/Automodel, nemo_automodel/components/moe/megatron/fused_a2a.py at e8d06c8, but for
    # destroy_buffer.
    fused_a2a.free_buffer: "",
    fused_a2a.destroy_buffer: "",
    fused_a2a.get_uccl_buffer: "group hidden_bytes",
    fused_a2a.uccl_fused_dispatch: FUSED_DISPATCH,
    fused_a2a.uccl_fused_combine: FUSED_COMBINE,
    fused_a2a.set_uccl_num_sms: "num_sms",
}
# Its arguments are in different orders in Megatron and in NeMo from some place on.
HYBRID_EP_DISPATCH = "x routing_map probs group num_local_experts num_sms_dispatch_api num_sms_combine_api"
OF_MEGATRON = "num_blocks_permute num_blocks_unpermute fused num_permuted_tokens pad_multiple num_sms_preprocessing_api"
OF_NEMO = (  # fused_a2a.py at e8d06c8
    "num_permuted_tokens pad_multiple topk_idx num_experts fuse_permute num_sms_preprocessing_api num_blocks_permute "
    "num_blocks_unpermute"
)


OF_NEMO_INIT = (  # its order
    "hidden_dim seq_len num_local_experts num_sms_dispatch_api num_sms_combine_api fp8_dispatch "
    "num_sms_preprocessing_api num_blocks_permute num_blocks_unpermute"
)


def parameters(f) -> dict[bool, list[str]]:
    """Names by whether they can be given by position."""
    found = inspect.signature(f).parameters.values()
    found = [each for each in found if each.name != "self"]
    return {
        by_position: [each.name for each in found if (each.kind is each.POSITIONAL_OR_KEYWORD) is by_position]
        for by_position in (True, False)
    }


@pytest.mark.parametrize("f", PUBLISHED, ids=lambda f: f.__qualname__)
def test_arguments_are_the_published_ones(f):
    """In their order; ours are by keyword alone."""
    assert parameters(f)[True] == PUBLISHED[f].split()


def test_arguments_by_name():
    ours = parameters(fused_a2a.hybrid_ep_dispatch)
    assert ours[True] == HYBRID_EP_DISPATCH.split()
    assert set(ours[False]) == {*OF_MEGATRON.split(), *OF_NEMO.split(), "topk"}
    init = parameters(fused_a2a.init_hybrid_ep_buffer)
    assert {"seq_len"} == set(init[False]) and set(OF_NEMO_INIT.split()) < {*init[True], *init[False]}
    ours = {"max_tokens_per_rank", "max_requests", "implementation", "timeout_s"}
    assert {"use_fabric", *ours} == set(parameters(Buffer)[False])
    assert ours == set(parameters(UCCLBuffer)[False])
    assert {"fuse_permute"} == set(parameters(fused_a2a.hybrid_ep_combine)[False])


def test_every_function_is_published():
    assert {f.__name__ for f in PUBLISHED if f.__module__ == fused_a2a.__name__} | {"hybrid_ep_dispatch"} == set(
        fused_a2a.__all__
    )


# ---- Layers, through the shared suite ----


@dataclasses.dataclass
class Adapter:
    """What the suite's layer needs of a communicator, made of names of compat."""

    mesh: Mesh
    case: Case
    buffer: Buffer

    config = types.SimpleNamespace(max_requests=0)

    def dispatch(self, x, topk_ids, weights, *, quant=None):
        raise NotImplementedError

    def combine(self, y, handle):
        raise NotImplementedError


def as_output(recv_x, handle, topk_weights) -> jax_ep.DispatchOutput:
    return jax_ep.DispatchOutput(recv_x, handle.layout, handle.num_dropped, handle.topk_ids, topk_weights)


class HighThroughput(Adapter):
    async_finish = False

    def dispatch(self, x, topk_ids, weights, *, quant=None):
        event = Buffer.capture()
        tokens_per_rank, rdma, tokens_per_expert, in_rank, event = self.buffer.get_dispatch_layout(
            topk_ids, self.case.num_experts, previous_event=event, async_finish=self.async_finish
        )
        recv_x, ids, probs, counts, handle, event = self.buffer.dispatch(
            x, None, tokens_per_rank, rdma, in_rank, tokens_per_expert, topk_ids, weights,
            previous_event=event, async_finish=self.async_finish, allocate_on_comm_stream=self.async_finish,
        )  # fmt: skip
        if self.async_finish:
            event.current_stream_wait()
        assert ids is handle.topk_ids
        return as_output(recv_x, handle, probs), handle

    def combine(self, y, handle):
        combined, none, event = self.buffer.combine(y, handle, async_finish=self.async_finish)
        with event:
            assert none is None
        return combined


class Halves(HighThroughput):
    async_finish = True


class LowLatency(Adapter):
    """Weights go with `low_latency_combine`, or with the dispatch."""

    weights_early = False
    options: dict = {}

    def dispatch(self, x, topk_ids, weights, *, quant=None):
        early = dict(topk_weights=weights) if self.weights_early else {}
        most = x.shape[0]
        recv_x, _, handle, _, hook = self.buffer.low_latency_dispatch(
            x, topk_ids, most, self.case.num_experts, use_fp8=False, **early, **self.options
        )
        if hook:
            hook()
        self.given = topk_ids, None if self.weights_early else weights
        return as_output(recv_x, handle, None), handle

    def combine(self, y, handle):
        combined, _, hook = self.buffer.low_latency_combine(y, *self.given, handle, **self.options)
        if hook:
            hook()
        return combined


class LowLatencyWeightsEarly(LowLatency):
    weights_early = True


class LowLatencyHalves(LowLatency):
    options = dict(return_recv_hook=True)


class Fused(Adapter):
    dispatched, combined = staticmethod(fused_a2a.fused_dispatch), staticmethod(fused_a2a.fused_combine)

    def dispatch(self, x, topk_ids, weights, *, quant=None):
        recv_x, ids, probs, counts, handle = self.dispatched(x, topk_ids, weights, self.case.num_experts, self.mesh)
        return as_output(recv_x, handle, probs), handle

    def combine(self, y, handle):
        combined, none = self.combined(y, self.mesh, handle, async_finish=True)
        assert none is None
        return combined


class FusedUCCL(Fused):
    dispatched, combined = staticmethod(fused_a2a.uccl_fused_dispatch), staticmethod(fused_a2a.uccl_fused_combine)


class Hybrid(Adapter):
    def dispatch(self, x, topk_ids, weights, *, quant=None):
        experts, tokens = self.case.num_experts, jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
        to = jnp.where(topk_ids >= 0, topk_ids, experts)
        probs = jnp.zeros((x.shape[0], experts), jnp.float32).at[tokens, to].add(weights, mode="drop")
        routing_map = jnp.zeros((x.shape[0], experts), bool).at[tokens, to].set(True, mode="drop")
        rows, self.probs, scales, counts, handle = fused_a2a.hybrid_ep_dispatch(
            x,
            routing_map,
            probs,
            self.mesh,
            experts // self.mesh.size,
            pad_multiple=self.case.expert_alignment,
            topk=self.case.topk,
        )
        assert scales is None
        return as_output(rows, handle, None), handle

    def combine(self, y, handle):
        return fused_a2a.hybrid_ep_combine(y * self.probs[:, None], handle, pad_multiple=self.case.expert_alignment)


ADAPTERS: list[tuple[type[Adapter], dict]] = [
    (HighThroughput, dict(layout=RANK_MAJOR)),
    (Halves, dict(layout=RANK_MAJOR, dtype="bfloat16")),
    (LowLatency, dict(mode=LOW_LATENCY, layout=EXPERT_MAJOR)),
    (LowLatencyWeightsEarly, dict(mode=LOW_LATENCY, layout=EXPERT_MAJOR, dtype="bfloat16")),
    (LowLatencyHalves, dict(mode=LOW_LATENCY, layout=EXPERT_MAJOR)),
    (Fused, dict(layout=RANK_MAJOR, dtype="bfloat16")),
    (FusedUCCL, dict(layout=RANK_MAJOR)),
    (Hybrid, dict(layout=FLAT, expert_alignment=4)),
]


def check_layer(implementation: str, mesh: Mesh, kind: type[Adapter], **arguments) -> None:
    """Against the plain API bit for bit, where experts do not apply the weights, and a dense layer, gradients too."""
    case = Case(num_ranks=mesh.size, num_tokens=13, topk=3, **arguments)
    inputs = suite.draw(dataclasses.replace(case, layout=EXPERT_MAJOR))  # no expert twice for a token
    buffer = Buffer(mesh, low_latency_mode=True, max_requests=1, implementation=implementation)
    with suite.communicator(implementation, mesh, case) as comm:
        placed = suite.place(inputs, mesh, comm.capacity)
        want = jax.block_until_ready(suite.make_step(comm, case)(placed))
    got = jax.block_until_ready(suite.make_step(kind(mesh, case, buffer), case)(placed))
    suite.assert_same(got.received, want.received)
    if kind is not Hybrid:
        suite.assert_same(suite.repeatable(implementation, got), suite.repeatable(implementation, want))
    suite.assert_dense(case, inputs, got)
    buffer.check()
    buffer.destroy()


@pytest.mark.parametrize("kind, arguments", ADAPTERS, ids=[kind.__name__ for kind, _ in ADAPTERS])
def test_layer(native_implementation, mesh, kind, arguments):
    check_layer(native_implementation, mesh, kind, **arguments)


def check_across_processes(task) -> None:
    """Each process builds its part of the communicators while it traces."""
    mesh = suite.make_mesh(task.implementation, len(suite.devices_of(task.implementation)))
    for kind in (HighThroughput, LowLatency, Hybrid):
        check_layer(task.implementation, mesh, kind, **dict(ADAPTERS)[kind])
    buffer = UCCLBuffer(mesh, num_rdma_bytes=2**20)
    assert buffer.is_intranode and buffer.num_rdma_bytes == 0
    identity = jax_ep._bootstrap.host_identity
    jax_ep._bootstrap.host_identity = lambda: f"host of process {task.process}"
    with pytest.raises(RuntimeError, match="different hosts"):
        UCCLBuffer(mesh)
    jax_ep._bootstrap.host_identity = identity


def test_across_processes(native_implementation, tmp_path, monkeypatch):
    import test_processes

    monkeypatch.setattr(test_processes, "WORKER", pathlib.Path(__file__))
    ended = test_processes.run_processes(tmp_path, "compat", native_implementation, num_processes=2, devices_each=1)
    test_processes.assert_ended(ended, [0, 0])


# ---- What the suite's layer does not show ----

E, K, T, H = 16, 2, 6, 128


def draw(mesh: Mesh, dtype=np.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, topk_idx, topk_weights of all ranks."""
    case = Case(num_ranks=mesh.size, num_tokens=T, hidden_size=H, topk=K, num_experts=E, layout=EXPERT_MAJOR)
    inputs = suite.draw(case)
    arrays = inputs.x.astype(dtype), inputs.topk_ids, inputs.weights
    return tuple(suite.put(array, mesh, P("ep")) for array in arrays)


def send(buffer: Buffer, x, topk_idx, topk_weights, **arguments):
    num_tokens_per_expert = buffer.get_dispatch_layout(topk_idx, E)[2]
    return buffer.dispatch(
        x, num_tokens_per_expert=num_tokens_per_expert, topk_idx=topk_idx, topk_weights=topk_weights, **arguments
    )


def test_layout(mesh):
    buffer = Buffer(mesh)

    @jax.jit
    def layout(topk_idx):
        def on_rank(topk_idx):
            per_rank, rdma, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, E)
            assert rdma is None
            return per_rank, per_expert, in_rank, buffer.rank[None]

        return mapped(mesh, on_rank)(topk_idx)

    topk_idx = draw(mesh)[1]
    per_rank, per_expert, in_rank, ranks = map(np.asarray, layout(topk_idx))
    num_local = E // mesh.size
    by_rank = np.asarray(topk_idx).reshape(mesh.size, T, K)
    for source, ids in enumerate(by_rank):
        wanted = [[rank in (row[row >= 0] // num_local) for rank in range(mesh.size)] for row in ids]
        np.testing.assert_array_equal(in_rank.reshape(mesh.size, T, -1)[source], wanted)
        np.testing.assert_array_equal(per_rank.reshape(mesh.size, -1)[source], np.sum(wanted, 0))
        np.testing.assert_array_equal(
            per_expert.reshape(mesh.size, -1)[source], np.bincount(ids[ids >= 0], minlength=E)
        )
    np.testing.assert_array_equal(ranks, np.arange(mesh.size))


def test_cached_handle_and_counts(mesh):
    """A second tensor along the routing of the first, which makes no communicator; counts as lists of DeepEP are."""
    buffer = Buffer(mesh)

    @jax.jit
    def both(x, topk_idx, weights):
        def on_rank(x, topk_idx, weights):
            _, _, no_weights, counts, handle, _ = send(buffer, x, topk_idx, None, expert_alignment=4)
            assert no_weights is None
            recv_x, *nothing, event = buffer.dispatch(x * 2, handle=handle, async_finish=True)
            assert nothing == [None] * 4 and event.event is not None
            quantised = _quant.quantize(x, QuantConfig())
            (elements, scales), *_ = buffer.dispatch(quantised, handle=handle)
            return recv_x, counts, elements, scales

        return mapped(mesh, on_rank)(x, topk_idx, weights)

    @jax.jit
    def plain(x, topk_idx, weights):
        def on_rank(x, topk_idx, weights):
            out, _ = comm.dispatch(x * 2, topk_idx)
            quantised, _ = comm.dispatch(x, topk_idx, quant=QuantConfig())
            return (
                out.tokens,
                -(-out.layout.num_tokens_per_expert // 4) * 4,
                quantised.tokens,
                quantised.quant.scales,
            )

        return mapped(mesh, on_rank)(x, topk_idx, weights)

    with MoECommunicator(
        mesh,
        num_experts=E,
        hidden_size=H,
        topk=K,
        max_tokens_per_rank=T,
        output_layout=RANK_MAJOR,
        dtype=jnp.float32,
    ) as comm:
        suite.assert_same(both(*draw(mesh)), jax.block_until_ready(plain(*draw(mesh))))
    assert len(buffer._communicators) == 1
    buffer.destroy()


def test_quantised_tokens(mesh):
    """Arrive as they were sent, and return in bfloat16."""
    buffer = Buffer(mesh)

    @jax.jit
    def layer(x, topk_idx, weights):
        def on_rank(x, topk_idx, weights):
            elements, scales = _quant.quantize(x, QuantConfig())
            (recv, recv_scales), _, _, _, handle, _ = send(buffer, (elements, scales), topk_idx, weights)
            rows = recv.astype(jnp.float32) * recv_scales
            combined, _, _ = buffer.combine(rows.astype(jnp.bfloat16), handle)
            return combined, elements.astype(jnp.float32) * scales

        return mapped(mesh, on_rank)(x, topk_idx, weights)

    x, topk_idx, weights = draw(mesh)
    combined, sent = layer(x, topk_idx, weights)
    ranks = np.where(np.asarray(topk_idx) >= 0, np.asarray(topk_idx) // (E // mesh.size), -1)
    copies = [len(set(row[row >= 0])) for row in ranks]
    assert combined.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(combined, np.float32), np.asarray(sent) * np.array(copies)[:, None], rtol=0.02, atol=1e-6
    )
    buffer.destroy()


def test_num_worst_tokens(mesh):
    """Sets the rows; fewer than come poison the step."""
    topk_idx = draw(mesh)[1]
    ranks = np.where(np.asarray(topk_idx) >= 0, np.asarray(topk_idx) // (E // mesh.size), -1)
    needed = max((ranks == rank).any(1).sum() for rank in range(mesh.size))
    for num_worst_tokens in (int(needed), int(needed) - 1):
        buffer = Buffer(mesh)

        @jax.jit
        def layer(*arrays, buffer=buffer, num_worst_tokens=num_worst_tokens):
            def on_rank(*arrays):
                recv_x, ids, _, _, handle, _ = send(buffer, *arrays, num_worst_tokens=num_worst_tokens)
                again, *_ = buffer.dispatch(arrays[0], handle=handle, num_worst_tokens=num_worst_tokens)
                return recv_x, ids, buffer.combine(recv_x, handle)[0], again

            return mapped(mesh, on_rank)(*arrays)

        recv_x, ids, combined, again = jax.block_until_ready(layer(*draw(mesh)))
        assert recv_x.shape[0] == again.shape[0] == mesh.size * num_worst_tokens
        if num_worst_tokens == needed:
            assert not np.asarray(recv_x)[(np.asarray(ids) < 0).all(1)].any()
            buffer.check()
        else:
            assert np.isnan(combined).all()
            with pytest.raises(CapacityError, match=f"^num_worst_tokens: expected at least {needed}"):
                buffer.check()
        buffer.destroy()


def test_combine_of_weights_and_bias(mesh):
    """The backward pass of a dispatch, written by hand as in an autograd.Function; and its own gradient."""
    buffer = Buffer(mesh)
    x, topk_idx, weights = draw(mesh)

    def both(x, weights, bias):
        def on_rank(x, topk_idx, weights, bias):
            recv_x, _, recv_weights, _, handle, _ = send(buffer, x, topk_idx, weights)
            plain, none, _ = buffer.combine(recv_x, handle)
            assert none is None
            combined, returned, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
            biased, _, _ = buffer.combine(recv_x, handle, bias=(bias, bias))
            return plain, combined, returned, biased

        return mapped(mesh, on_rank)(x, topk_idx, weights, bias)

    plain, combined, returned, biased = jax.jit(both)(x, weights, x)
    suite.assert_same(combined, plain)
    used = np.asarray(topk_idx) >= 0
    np.testing.assert_array_equal(returned, np.where(used, weights, 0))
    np.testing.assert_allclose(biased, np.asarray(plain) + 2 * np.asarray(x), rtol=1e-5, atol=1e-6)

    def loss(x, weights):
        _, combined, returned, _ = both(x, weights, x)
        return jnp.square(combined).sum() + (returned**3).sum()

    x_gradient, weight_gradient = jax.jit(jax.grad(loss, (0, 1)))(x, weights)
    copies = np.asarray(plain)[:, :1] / np.asarray(x)[:, :1]
    np.testing.assert_allclose(x_gradient, 2 * copies**2 * np.asarray(x), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weight_gradient, 3 * np.where(used, weights, 0) ** 2, rtol=1e-5, atol=1e-6)
    buffer.destroy()


QUANTISED: dict[str, tuple[dict, Any, Any]] = {
    "float32": (dict(), jnp.float32, jnp.float32),
    "round_scale": (dict(round_scale=True), jnp.float8_e8m0fnu, jnp.float32),
    "use_ue8m0": (dict(round_scale=True, use_ue8m0=True), jnp.float8_e8m0fnu, jnp.float8_e8m0fnu),
}


def test_low_latency_fp8(mesh):
    """Elements and scales are those of the plain API; float32 scales of round_scale are its powers of two."""
    buffer = Buffer(mesh, low_latency_mode=True)
    buffer.clean_low_latency_buffer(T, H, E)

    @jax.jit
    def forward(*arrays):
        def on_rank(x, topk_idx, weights):
            got, want = [], []
            for options, scale_dtype, _ in QUANTISED.values():
                (elements, scales), count, *_ = buffer.low_latency_dispatch(x, topk_idx, T, E, **options)
                plain, _ = comm.dispatch(x, topk_idx, quant=QuantConfig(scale_dtype=scale_dtype))
                has_token = (jnp.arange(elements.shape[1]) < count[:, None])[..., None]
                kept = [(elements, scales), (plain.tokens, plain.quant.scales)]
                for into, arrays in zip((got, want), kept, strict=True):
                    into.append([jnp.where(has_token, array, jnp.ones((), array.dtype)) for array in arrays])
                got[-1].append(count)
                want[-1].append(plain.layout.num_tokens_per_expert)
            return got, want

        return mapped(mesh, on_rank)(*arrays)

    with MoECommunicator(
        mesh, num_experts=E, hidden_size=H, topk=K, max_tokens_per_rank=T, mode=LOW_LATENCY, dtype=jnp.bfloat16
    ) as comm:
        got, want = jax.block_until_ready(forward(*draw(mesh, jnp.bfloat16)))
    for (_, _, dtype), got_each, want_each in zip(QUANTISED.values(), got, want, strict=True):
        assert got_each[0].dtype == jnp.float8_e4m3fn and got_each[1].dtype == dtype
        assert got_each[0].shape == (E, mesh.size * T, H) and got_each[1].shape == (E, mesh.size * T, 1)
        want_each[1] = _quant.scale_values(want_each[1]) if dtype == jnp.float32 else want_each[1]
        suite.assert_same(got_each, want_each)
    mantissas, _ = np.frexp(np.asarray(got[1][1]))
    assert (mantissas == 0.5).all(), "powers of two"
    buffer.destroy()


def test_halves_where_requests_are_allowed(mesh):
    """And whole ops otherwise, though asked for the same. Events and hooks are no part of the program."""
    for max_requests in (0, 1):
        buffer = Buffer(mesh, low_latency_mode=True, max_requests=max_requests)

        def layer(waits, *arrays, buffer=buffer):
            recv_x, *_, handle, event = send(buffer, *arrays, async_finish=True)
            if waits:
                event.current_stream_wait()
            out, _, event = buffer.combine(recv_x, handle, previous_event=event if waits else None, async_finish=True)
            slots, _, handle, event, hook = buffer.low_latency_dispatch(
                out, arrays[1], T, E, use_fp8=False, return_recv_hook=True
            )
            assert event.event is None and (not waits or hook() is None)
            out, event, hook = buffer.low_latency_combine(slots, *arrays[1:], handle, async_finish=True)
            assert hook is None
            if waits:
                event.current_stream_wait()
            return out

        def program(waits, layer=layer):
            return str(jax.make_jaxpr(mapped(mesh, functools.partial(layer, waits)))(*draw(mesh)))

        for op in ("dispatch", "combine"):
            assert program(True).count(f"target_name=jax_ep_{op}_start") == 2 * max_requests
        assert program(True) == program(False)
        buffer.destroy()


# ---- What is made, kept and freed ----


def traced(mesh: Mesh, f, num_tokens: int = T, dtype=jnp.float32):
    """Traces it, with x, topk_idx and topk_weights of one rank."""
    shapes = (num_tokens, H), (num_tokens, K), (num_tokens, K)
    arrays = [
        jax.ShapeDtypeStruct((mesh.size * rows, columns), each, sharding=NamedSharding(mesh, P("ep")))
        for (rows, columns), each in zip(shapes, (dtype, jnp.int32, jnp.float32), strict=True)
    ]
    return jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")), *arrays)


def test_communicators_by_size(mesh):
    """One for each different size, or for all up to a given number of tokens."""
    for most, wanted in ((None, 2), (T, 1)):
        buffer = Buffer(mesh, max_tokens_per_rank=most)
        for num_tokens in (T, T - 2, T):
            recv_x = traced(mesh, lambda *arrays, b=buffer: send(b, *arrays)[0], num_tokens)
            assert recv_x.shape == (mesh.size * mesh.size * (most or num_tokens), H)
        assert len(buffer._communicators) == wanted
        assert buffer.arena_bytes == sum(each.arena_bytes for each in buffer._communicators.values())
        buffer.destroy()


def test_number_of_sms(mesh):
    assert Buffer.get_dispatch_config(mesh.size).num_sms is None
    Buffer.set_num_sms(24)
    assert UCCLBuffer.num_sms == 24
    fused_a2a.set_uccl_num_sms(16)
    assert (Buffer.num_sms, UCCLBuffer.num_sms) == (24, 16)
    buffer, uccl = Buffer(mesh), UCCLBuffer(mesh)

    def layer(*arrays):
        recv_x, *_, handle, _ = send(buffer, *arrays)
        with pytest.raises(ValueError, match=r"^config.num_sms: expected 24, .* got 8$"):
            buffer.combine(recv_x, handle, config=Config(8))
        send(buffer, *arrays, config=Config(num_sms=8))
        send(uccl, *arrays)
        return buffer.combine(recv_x, handle, config=Buffer.get_combine_config(mesh.size))[0]

    traced(mesh, layer)
    assert [each.config.num_sms for each in buffer._communicators.values()] == [24, 8]
    assert [each.config.num_sms for each in uccl._communicators.values()] == [16]
    fused_a2a.set_deepep_num_sms(4)
    assert Buffer.num_sms == 4
    for each in (buffer, uccl):
        each.destroy()


def test_size_hints(mesh):
    assert Buffer.get_low_latency_rdma_size_hint(T, H, mesh.size, E) == 0
    config = Buffer.get_combine_config(mesh.size)
    assert config.get_nvl_buffer_size_hint(2 * H, mesh.size) == config.get_rdma_buffer_size_hint(2 * H, mesh.size) == 0
    assert fused_a2a.get_hidden_bytes(jnp.zeros((3, H), jnp.bfloat16)) == 2 * H
    assert fused_a2a.get_hidden_bytes(jnp.zeros((3, H), jnp.float8_e4m3fn)) == 2 * H
    assert fused_a2a.get_hidden_bytes(jnp.zeros((3, H), jnp.float32)) == 4 * H


def test_uccl_buffer(mesh):
    buffer = UCCLBuffer(mesh, num_nvl_bytes=2**20, num_rdma_bytes=2**30)
    assert (buffer.is_intranode, buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (True, 2**20, 0)
    buffer.reset_rdma_buffer()
    buffer.destroy()


def test_buffers_of_groups(mesh):
    buffer = fused_a2a.get_buffer(mesh, 2 * H)
    assert fused_a2a.get_buffer((mesh, "ep"), 4 * H) is buffer
    assert fused_a2a.get_uccl_buffer(mesh, 2 * H) is not buffer
    other = Mesh(mesh.devices, ("model",))
    assert fused_a2a.get_buffer((other, "model"), 2 * H) is not buffer
    assert fused_a2a.get_buffer(mesh, 2 * H) is buffer
    fused_a2a.free_buffer()
    assert buffer.is_destroyed and fused_a2a.get_buffer(mesh, 2 * H) is not buffer
    fused_a2a.get_buffer(mesh, 2 * H).destroy()
    assert not fused_a2a.get_buffer(mesh, 2 * H).is_destroyed


def test_buffers_that_are_freed(mesh):
    def made():
        return fused_a2a.get_buffer(mesh, 2 * H), fused_a2a.get_uccl_buffer(mesh, 2 * H)

    buffer, uccl = made()
    fused_a2a.free_buffer()
    assert buffer.is_destroyed and not uccl.is_destroyed and made()[1] is uccl
    buffer, _ = made()
    fused_a2a.destroy_buffer()
    assert buffer.is_destroyed and uccl.is_destroyed
    assert not any(each.is_destroyed for each in made())


def test_another_axis(native_implementation):
    mesh = make_mesh(native_implementation)
    mesh = Mesh(mesh.devices.reshape(1, -1), ("data", "model"))
    buffer = Buffer((mesh, "model"))
    assert buffer.group_size == mesh.size

    def layer(x, topk_idx, weights):
        return send(buffer, x, topk_idx, weights)[0]

    arrays = jnp.ones((mesh.size * T, H)), jnp.zeros((mesh.size * T, K), jnp.int32), jnp.ones((mesh.size * T, K))
    run = jax.shard_map(layer, mesh=mesh, in_specs=P("model"), out_specs=P("model"))
    recv_x = np.asarray(jax.jit(run)(*arrays)).reshape(mesh.size, -1, H)
    assert recv_x[0].all() and not recv_x[1:].any()
    buffer.destroy()


def hybrid(mesh: Mesh, x, ids, weights, **arguments):
    """By ids, unless it is told otherwise; each token has one probability for all experts."""
    probs = jnp.zeros((x.shape[0], E), jnp.float32) + weights[:, :1]
    arguments = dict(topk_idx=ids, routing_map=None) | arguments
    return fused_a2a.hybrid_ep_dispatch(x, probs=probs, group=mesh, num_local_experts=E // mesh.size, **arguments)


def test_hybrid_ep_grows(mesh):
    """Communicators serve calls up to the most tokens so far, and are freed by a reset."""
    fused_a2a.init_hybrid_ep_buffer(mesh, H, T, E // mesh.size, 16)
    (state,) = fused_a2a._hybrid_ep_buffers.values()

    def rows(num_tokens: int) -> int:
        layer = lambda *arrays: fused_a2a.hybrid_ep_combine(*hybrid(mesh, *arrays)[::4])  # noqa: E731
        traced(mesh, layer, num_tokens)
        return [each.config.max_tokens_per_rank for each in state.buffer._communicators.values()]

    assert rows(T - 1) == rows(T) == [T]
    assert rows(T + 2) == rows(T - 1) == [T, T + 2]
    assert {each.config.num_sms for each in state.buffer._communicators.values()} == {16}
    fused_a2a.init_hybrid_ep_buffer(mesh, H, seq_len=T + 1, num_local_experts=E // mesh.size)
    assert rows(T) == [T, T + 2]
    fused_a2a.reset_hybrid_ep_buffer()
    assert state.buffer.is_destroyed and not fused_a2a._hybrid_ep_buffers
    handles = []
    traced(mesh, lambda *arrays: handles.append(hybrid(mesh, *arrays)[4]) or arrays[0])
    fused_a2a.reset_hybrid_ep_buffer()
    with pytest.raises(ValueError, match="^handle: expected one of hybrid_ep_dispatch"):
        fused_a2a.hybrid_ep_combine(jnp.ones((1, H)), handles[0])


def test_hybrid_ep_routing(mesh):
    """By map or by ids; rows and their probabilities are grouped by expert and padded; C is as given."""
    x, topk_idx, weights = draw(mesh)
    num_rows = mesh.size * T * K + 4 * E

    @jax.jit
    def by_map_and_by_ids(x, topk_idx, weights):
        def on_rank(x, topk_idx, weights):
            chosen = (topk_idx[..., None] == jnp.arange(E, dtype=jnp.int32)).any(1)
            options = dict(num_permuted_tokens=num_rows, pad_multiple=4, num_experts=E, fused=True)
            of_map = hybrid(mesh, x, topk_idx, weights, routing_map=chosen, **options)
            of_ids = hybrid(mesh, x, topk_idx, weights, **options)
            combined = fused_a2a.hybrid_ep_combine(of_ids[0], of_ids[4], num_rows, 4)
            return of_map[:4], of_ids[:4], combined

        return mapped(mesh, on_rank)(x, topk_idx, weights)

    of_map, of_ids, combined = by_map_and_by_ids(x, topk_idx, weights)
    suite.assert_same(of_map, of_ids)
    rows, probs, _, sizes = of_ids
    assert rows.shape == (mesh.size * num_rows, H) and probs.shape == (mesh.size * num_rows,)
    ids = np.asarray(topk_idx)
    np.testing.assert_array_equal(sizes, [-(-int((ids == expert).sum()) // 4) * 4 for expert in range(E)])
    start = 0
    for expert in range(E // mesh.size):  # of rank 0
        tokens = np.flatnonzero((ids == expert).any(1))
        here = slice(start, start + len(tokens))
        np.testing.assert_array_equal(np.asarray(rows)[here], np.asarray(x)[tokens])
        np.testing.assert_array_equal(np.asarray(probs)[here], np.asarray(weights)[tokens, 0])
        start += int(np.asarray(sizes)[expert])
        assert not np.asarray(rows)[here.stop : start].any()
    np.testing.assert_allclose(combined, np.asarray(x) * (ids >= 0).sum(1, keepdims=True), rtol=1e-6, atol=1e-6)


def test_hybrid_ep_counts_an_expert_once(mesh):
    """That a token names more than once: by ids as by a routing map, which has a bit for each expert."""

    @jax.jit
    def combined(x, topk_idx, weights):
        def on_rank(x, topk_idx, weights):
            rows, probs, _, sizes, handle = hybrid(mesh, x, topk_idx, weights)
            return fused_a2a.hybrid_ep_combine(rows * probs[:, None], handle), sizes

        return mapped(mesh, on_rank)(x, topk_idx, weights)

    ids = jnp.tile(jnp.array([[3, 3, -1, 7, 3, -1]], jnp.int32), (mesh.size * T, 1))
    ids = suite.put(np.asarray(ids), mesh, P("ep"))
    x, _, weights = draw(mesh)
    got, sizes = combined(x, ids, weights)
    np.testing.assert_allclose(got, 2 * np.asarray(weights)[:, :1] * np.asarray(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(sizes, np.isin(np.arange(E), (3, 7)) * mesh.size * T)


def test_hybrid_ep_with_more_experts_than_topk(mesh):
    """Is never cut off silently: the step is poisoned."""

    @jax.jit
    def layer(x, topk_idx, weights):
        def on_rank(x, topk_idx, weights):
            everywhere = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32) < K + 1, (T, E))
            return hybrid(mesh, x, topk_idx, weights, routing_map=everywhere)[0]

        return mapped(mesh, on_rank)(x, topk_idx, weights)

    assert np.isnan(jax.block_until_ready(layer(*draw(mesh)))).all()
    (state,) = fused_a2a._hybrid_ep_buffers.values()
    with pytest.raises(ExpertIdError, match="^topk_ids: expected"):
        state.buffer.check()


if __name__ == "__main__":
    import worker

    worker.SCENARIOS["compat"] = check_across_processes
    worker.main()
