"""What `jax_ep.compat` refuses: each error names the argument as its caller knows it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import test_compat
from jax.sharding import Mesh
from test_compat import E, H, K, T, draw, hybrid, mapped, send, traced

from jax_ep import CapacityError, ExpertIdError
from jax_ep.compat import Buffer, Config, EventHandle, EventOverlap, UCCLBuffer, fused_a2a

mesh, nothing_is_kept = test_compat.mesh, test_compat.nothing_is_kept


def test_events():
    with pytest.raises(ValueError, match="^event: expected that of a call with async_finish=True"):
        EventOverlap().current_stream_wait()
    with Buffer.capture() as event:
        event.current_stream_wait()
    assert EventOverlap(EventHandle(), (1,)).extra_tensors == (1,)
    event = jax.jit(lambda event: event)(EventOverlap(EventHandle()))
    assert isinstance(event.event, EventHandle) and not jax.tree.leaves(event), "it holds no array to wait for"


@pytest.mark.parametrize(
    "error, text, arguments",
    [
        (NotImplementedError, "comm: not in jax_ep: ", dict(comm=object())),
        (NotImplementedError, "enable_shrink=True: not in jax_ep: ", dict(enable_shrink=True)),
        (
            NotImplementedError,
            "allow_nvlink_for_low_latency_mode=False: not in jax_ep: ",
            dict(allow_nvlink_for_low_latency_mode=False),
        ),
        (ValueError, "max_tokens_per_rank: expected at least 1, got 0", dict(max_tokens_per_rank=0)),
        (TypeError, "group: expected a jax.sharding.Mesh, or one and an axis name, got list", dict(group=[0, 1])),
        (ValueError, r"group: expected an axis of the mesh, one of \('ep',\), got 'model'", dict(group="model")),
    ],
)
def test_argument_of_the_constructor(mesh, error, text, arguments):
    if arguments.get("group") == "model":
        arguments = dict(group=(mesh, "model"))
    with pytest.raises(error, match=f"^{text}"):
        Buffer(**dict(group=mesh) | arguments)


REFUSED_METHODS = {
    "internode_dispatch": (),
    "internode_combine": (),
    "get_comm_stream": (),
    "get_local_buffer_tensor": (jnp.bfloat16,),
    "get_next_low_latency_combine_buffer": (None,),
    "low_latency_update_mask_buffer": (0,),
    "low_latency_query_mask_buffer": (None,),
    "low_latency_clean_mask_buffer": (),
    "connect_atomic_buffer": (None,),
}


def test_methods_that_are_not_there(mesh):
    buffer = UCCLBuffer(mesh)
    for name, arguments in REFUSED_METHODS.items():
        with pytest.raises(NotImplementedError, match=f"^{name}: not in jax_ep: "):
            getattr(buffer, name)(*arguments)


@dataclasses.dataclass
class Calls:
    """Calls with one argument changed, and what a rank has to make them."""

    mesh: Mesh
    buffer: Buffer
    x: jax.Array
    topk_idx: jax.Array
    weights: jax.Array

    def __post_init__(self):
        self.recv_x, _, self.recv_weights, _, self.handle, _ = send(self.buffer, self.x, self.topk_idx, self.weights)
        self.experts = jnp.zeros((E,), jnp.int32)
        self.wide = jnp.zeros((T, 33), jnp.int32)
        self.slots, _, self.of_slots, _, _ = self.sent_to_slots()
        self.weighted = self.sent_to_slots(topk_weights=self.weights)[2]
        self.unweighted = send(self.buffer, self.x, self.topk_idx, None)[4]

    def sent_to_slots(self, **options):
        return self.buffer.low_latency_dispatch(self.x, self.topk_idx, T, E, use_fp8=False, **options)

    def layout(self, *arguments, **others):
        return lambda: self.buffer.get_dispatch_layout(*arguments, **others)

    def dispatch(self, **others):
        arguments = dict(x=self.x, num_tokens_per_expert=self.experts, topk_idx=self.topk_idx)
        return lambda: self.buffer.dispatch(**arguments | others)

    def combine(self, buffer=None, **others):
        arguments = dict(x=self.recv_x, handle=self.handle)
        return lambda: (buffer or self.buffer).combine(**arguments | others)

    def latency(self, buffer=None, **others):
        arguments = dict(x=self.x, topk_idx=self.topk_idx, num_max_dispatch_tokens_per_rank=T, num_experts=E)
        return lambda: (buffer or self.buffer).low_latency_dispatch(**arguments | others)

    def latency_combine(self, buffer=None, **others):
        arguments = dict(x=self.slots, topk_idx=self.topk_idx, topk_weights=self.weights, handle=self.of_slots)
        return lambda: (buffer or self.buffer).low_latency_combine(**arguments | others)

    def hybrid(self, x=None, **others):
        x = self.x if x is None else x
        return lambda: hybrid(self.mesh, x, self.topk_idx, self.weights, **others)

    def fused(self, x=None, **others):
        arguments = dict(token_indices=self.topk_idx, token_probs=self.weights, num_experts=E, group=self.mesh)
        return lambda: fused_a2a.fused_dispatch(self.x if x is None else x, **arguments | others)


def of_dispatch(calls: Calls, plain: Buffer, other: Buffer):
    """Calls, and what they raise."""
    layout, dispatch, x, topk_idx, handle = calls.layout, calls.dispatch, calls.x, calls.topk_idx, calls.handle
    elements, experts = x.astype(jnp.float8_e4m3fn), calls.experts
    by_handle = dict(topk_idx=None, handle=handle)
    unequal = [
        (layout(topk_idx, E + 1), ValueError, r"num_experts: expected a multiple of \d ranks, got 17"),
        (
            dispatch(num_tokens_per_expert=jnp.zeros((E + 1,), jnp.int32)),
            ValueError,
            r"num_tokens_per_expert.shape\[0\]: expected a multiple of the \d ranks, got 17",
        ),
    ]
    return [
        *(unequal if calls.mesh.size > 1 else []),
        (layout(topk_idx, 0), ValueError, "num_experts: expected at least 1, got 0"),
        (layout(calls.weights, E), TypeError, "topk_idx: expected dtype int32, got float32"),
        (layout(topk_idx, E, 3), TypeError, "previous_event: expected an EventOverlap or None, got int"),
        (dispatch(previous_event=3), TypeError, "previous_event: expected an EventOverlap or None, got int"),
        (dispatch(num_tokens_per_rdma_rank=experts), NotImplementedError, "num_tokens_per_rdma_rank: not in jax_ep: "),
        (dispatch(num_worst_tokens=-1), ValueError, "num_worst_tokens: expected at least 0, got -1"),
        (dispatch(num_worst_tokens=1.0), TypeError, "num_worst_tokens: expected an int, got float 1.0"),
        (dispatch(num_worst_tokens=2**31), ValueError, r"num_worst_tokens: expected less than 2\*\*31, got"),
        (dispatch(expert_alignment=0), ValueError, "expert_alignment: expected at least 1, got 0"),
        (dispatch(config={}), TypeError, "config: expected a Config or None, got dict"),
        (dispatch(config=Config(0)), ValueError, "config.num_sms: expected at least 1, got 0"),
        (dispatch(**by_handle, config={}), TypeError, "config: expected a Config or None, got dict"),
        (dispatch(topk_idx=None), TypeError, "topk_idx: expected an array, got NoneType"),
        (dispatch(topk_idx=calls.wide), ValueError, r"topk_idx.shape\[1\]: expected at most 32, got 33"),
        (dispatch(topk_weights=calls.weights[1:]), ValueError, "topk_weights: expected shape "),
        (dispatch(num_tokens_per_expert=None), TypeError, "num_tokens_per_expert: expected an array, got NoneType"),
        (dispatch(x=None), TypeError, "x: expected an array, got NoneType"),
        (dispatch(x=x.astype(jnp.int32)), ValueError, "x.dtype: expected one of .*, got int32"),
        (dispatch(x=x[:, :0]), ValueError, r"x.shape\[1\]: expected at least 1, got 0"),
        (dispatch(x=(x, x, x)), ValueError, r"x: expected an array, or \(elements, scales\), got 3 arrays"),
        (dispatch(x=(x, x[:, :1])), ValueError, r"x\[0\].dtype: expected one of .*, got float32"),
        (dispatch(x=(elements, x[:, :1].astype(jnp.float16))), ValueError, r"x\[1\].dtype: expected one of .*, got"),
        (dispatch(x=(elements, x)), ValueError, r"x\[1\]: expected blocks whose scales take at most the 128 bytes"),
        (
            dispatch(x=(elements, x[:, :3])),
            ValueError,
            r"x\[1\]: expected scales for equal blocks of 128 elements, got",
        ),
        (dispatch(x=(elements, x[1:, :1])), ValueError, r"x\[1\]: expected shape \[6, H / block\], got shape \[5, 1\]"),
        (dispatch(handle=handle), ValueError, "topk_idx, topk_weights: expected None beside a handle, got arrays"),
        (dispatch(handle=3, topk_idx=None), TypeError, "handle: expected a DispatchHandle, got int"),
        (
            dispatch(handle=calls.of_slots, topk_idx=None),
            ValueError,
            "handle: expected one of dispatch, got one of low_latency_dispatch$",
        ),
        (dispatch(**by_handle, x=x[1:]), ValueError, "x: expected 6 tokens, got 5"),
        (
            dispatch(**by_handle, num_worst_tokens=1),
            ValueError,
            r"num_worst_tokens: expected 0 or \d+, the rows of the handle's dispatch, got 1",
        ),
    ]


def of_combine(calls: Calls, plain: Buffer, other: Buffer):
    combine, x, recv_x = calls.combine, calls.x, calls.recv_x
    return [
        (combine(buffer=other), ValueError, "handle: expected one of this Buffer, got another's"),
        (
            combine(x=calls.slots, handle=calls.of_slots),
            ValueError,
            "handle: expected one of dispatch, got one of low_latency_dispatch$",
        ),
        (combine(config={}), TypeError, "config: expected a Config or None, got dict"),
        (combine(x=recv_x[1:]), ValueError, "x: expected shape "),
        (combine(x=recv_x.astype(jnp.bfloat16)), TypeError, "x: expected dtype float32, got bfloat16"),
        (combine(topk_weights=calls.recv_weights[1:]), ValueError, "topk_weights: expected shape "),
        (combine(bias=x[1:]), ValueError, r"bias: expected shape \[6, 128\], got shape \[5, 128\]"),
        (combine(bias=(x, x, x)), ValueError, "bias: expected an array, or a pair of them, got 3 arrays"),
        (combine(bias=(x,)), ValueError, "bias: expected an array, or a pair of them, got 1 arrays"),
        (combine(previous_event=1), TypeError, "previous_event: expected an EventOverlap or None, got int"),
    ]


def of_low_latency(calls: Calls, plain: Buffer, other: Buffer):
    latency, latency_combine, x = calls.latency, calls.latency_combine, calls.x
    return [
        (latency(buffer=plain), ValueError, "low_latency_dispatch: expected a Buffer with low_latency_mode=True"),
        (
            latency(cumulative_local_expert_recv_stats=calls.experts),
            NotImplementedError,
            "cumulative_local_expert_recv_stats: not in jax_ep: .* Add recv_count",
        ),
        (
            latency(dispatch_wait_recv_cost_stats=calls.experts),
            NotImplementedError,
            "dispatch_wait_recv_cost_stats: not in jax_ep: ",
        ),
        (latency(use_ue8m0=True), ValueError, "use_ue8m0: expected False without round_scale, got True"),
        (latency(topk_idx=calls.weights), TypeError, "topk_idx: expected dtype int32, got float32"),
        (latency(topk_idx=calls.wide), ValueError, r"topk_idx.shape\[1\]: expected at most 32, got 33"),
        (latency(topk_weights=calls.weights[1:]), ValueError, "topk_weights: expected shape "),
        (
            latency(num_max_dispatch_tokens_per_rank=0),
            ValueError,
            "num_max_dispatch_tokens_per_rank: expected at least 1, got 0",
        ),
        (latency(x=x[:, :100]), ValueError, r"x.shape\[1\]: expected a multiple of 128 with use_fp8, got 100"),
        (latency(x=x.astype(jnp.int32), use_fp8=False), ValueError, "x.dtype: expected one of .*, got int32"),
        (
            latency_combine(buffer=plain),
            ValueError,
            "low_latency_combine: expected a Buffer with low_latency_mode=True",
        ),
        (latency_combine(use_logfmt=True), NotImplementedError, "use_logfmt=True: not in jax_ep: "),
        (latency_combine(zero_copy=True), NotImplementedError, "zero_copy=True: not in jax_ep: "),
        (latency_combine(out=x), NotImplementedError, "out: not in jax_ep: "),
        (
            latency_combine(combine_wait_recv_cost_stats=x),
            NotImplementedError,
            "combine_wait_recv_cost_stats: not in jax_ep: ",
        ),
        (latency_combine(topk_weights=None), TypeError, "topk_weights: expected an array, got NoneType"),
        (
            latency_combine(handle=calls.weighted),
            ValueError,
            "topk_weights: expected None, since low_latency_dispatch was",
        ),
        (latency_combine(topk_idx=calls.topk_idx[1:]), ValueError, "topk_idx: expected shape "),
        (
            latency_combine(x=calls.recv_x, handle=calls.unweighted),
            ValueError,
            "handle: expected one of low_latency_dispatch, got one of dispatch$",
        ),
    ]


def of_fused(calls: Calls, plain: Buffer, other: Buffer):
    by_hybrid, fused, x = calls.hybrid, calls.fused, calls.x
    return [
        (fused(x=x.astype(jnp.int32)), ValueError, "x.dtype: expected one of .*, got int32"),
        (fused(token_indices=calls.weights), TypeError, "token_indices: expected dtype int32, got float32"),
        (
            fused(token_indices=calls.wide, token_probs=jnp.zeros((T, 33))),
            ValueError,
            r"token_indices.shape\[1\]: expected at most 32, got 33",
        ),
        (by_hybrid(topk_idx=None), ValueError, "routing_map: expected an array, or topk_idx, got neither"),
        (by_hybrid(topk=1), ValueError, "topk: expected 2, the K of topk_idx, got 1"),
        (
            by_hybrid(routing_map=jnp.ones((T, E), bool), topk_idx=None, topk=E + 1),
            ValueError,
            "topk: expected at most the 16 experts, got 17",
        ),
        (by_hybrid(topk_idx=calls.wide), ValueError, r"topk_idx.shape\[1\]: expected at most 32, got 33"),
        (by_hybrid(x=x.astype(jnp.int32)), ValueError, "x.dtype: expected one of .*, got int32"),
        (by_hybrid(routing_map=jnp.ones((T, E))), TypeError, "routing_map: expected dtype bool, got float32"),
        (by_hybrid(num_experts=E + 1), ValueError, "num_experts: expected 16, num_local_experts on each rank, got 17"),
        (by_hybrid(pad_multiple=0), ValueError, "pad_multiple: expected at least 1, got 0"),
        (by_hybrid(num_permuted_tokens=0), ValueError, "num_permuted_tokens: expected at least 1, got 0"),
        (by_hybrid(num_sms_dispatch_api=0), ValueError, "num_sms_dispatch_api: expected at least 1, got 0"),
        (by_hybrid(num_sms_combine_api=True), TypeError, "num_sms_combine_api: expected an int, got bool True"),
        (by_hybrid(num_blocks_unpermute=True), TypeError, "num_blocks_unpermute: expected an int, got bool True"),
        (
            by_hybrid(num_sms_dispatch_api=8, num_sms_combine_api=16),
            ValueError,
            "num_sms_combine_api: expected num_sms_dispatch_api=8, since there is one number, got 16",
        ),
    ]


@pytest.mark.parametrize("refused", [of_dispatch, of_combine, of_low_latency, of_fused], ids=lambda f: f.__name__)
def test_arguments_of_calls(mesh, refused):
    buffer, plain, other = Buffer(mesh, low_latency_mode=True), Buffer(mesh), Buffer(mesh)

    def layer(*arrays):
        send(other, *arrays)
        for call, error, text in refused(Calls(mesh, buffer, *arrays), plain, other):
            with pytest.raises(error, match=f"^{text}"):
                call()
        return arrays[0]

    traced(mesh, layer)
    for each in (buffer, plain, other):
        each.destroy()


def test_arguments_of_hybrid_ep_combine(mesh):
    def layer(*arrays):
        rows, _, _, _, handle = hybrid(mesh, *arrays, pad_multiple=2)
        with pytest.raises(ValueError, match="^pad_multiple: expected 2, that of the dispatch, got 4"):
            fused_a2a.hybrid_ep_combine(rows, handle, pad_multiple=4)
        with pytest.raises(ValueError, match=r"^num_permuted_tokens: expected \d+, that of the dispatch, got 4"):
            fused_a2a.hybrid_ep_combine(rows, handle, 4)
        with pytest.raises(ValueError, match="^x: expected shape "):
            fused_a2a.hybrid_ep_combine(rows[1:], handle)
        return arrays[0]

    traced(mesh, layer)


def test_calls_at_the_wrong_place_or_time(mesh):
    buffer = Buffer(mesh)
    x = jnp.ones((T, H))
    with pytest.raises(ValueError, match="^dispatch: expected a call inside jax.shard_map over mesh axis 'ep'"):
        buffer.dispatch(x)
    with pytest.raises(ValueError, match="^hybrid_ep_dispatch: expected a call inside jax.shard_map"):
        fused_a2a.hybrid_ep_dispatch(x, None, x, mesh, 1)
    for name in ("fused_dispatch", "uccl_fused_dispatch"):
        with pytest.raises(ValueError, match=f"^{name}: expected a call inside jax.shard_map"):
            getattr(fused_a2a, name)(x, jnp.zeros((T, K), jnp.int32), jnp.ones((T, K)), E, mesh)
    for name in ("fused_combine", "uccl_fused_combine"):
        with pytest.raises(ValueError, match=f"^{name}: expected a call inside jax.shard_map"):
            getattr(fused_a2a, name)(x, mesh, None)
    assert not buffer._communicators
    buffer.destroy()
    with pytest.raises(ValueError, match="^dispatch: expected a live Buffer, got one after destroy"):
        buffer.dispatch(x)
    with pytest.raises(ValueError, match="^Buffer: expected a live one, got one after destroy"):
        buffer.communicator(dtype=jnp.float32)


def test_arguments_of_functions_that_set_something(mesh):
    init = fused_a2a.init_hybrid_ep_buffer
    with pytest.raises(NotImplementedError, match="^fp8_dispatch=True: not in jax_ep: "):
        init(mesh, H, T, 1, fp8_dispatch=True)
    for arguments, got in ((dict(), "neither"), (dict(num_tokens=T, seq_len=T), "both")):
        with pytest.raises(ValueError, match=f"^num_tokens, seq_len: expected one of both, got {got}"):
            init(mesh, H, **arguments)
    for name in ("num_tokens", "seq_len"):
        with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got 0"):
            init(mesh, H, **{name: 0})
    for name in ("num_local_experts", "num_sms_combine_api", "num_blocks_unpermute", "num_sms_preprocessing_api"):
        with pytest.raises(TypeError, match=f"^{name}: expected an int, got bool True"):
            init(mesh, H, T, **{name: True})
    with pytest.raises(ValueError, match="^hidden_bytes: expected at least 1, got 0"):
        fused_a2a.get_buffer(mesh, 0)
    with pytest.raises(TypeError, match="^x: expected an array, got NoneType"):
        fused_a2a.fused_dispatch(None, None, None, E, mesh)
    for set_num_sms in (fused_a2a.set_deepep_num_sms, fused_a2a.set_uccl_num_sms):
        with pytest.raises(ValueError, match="^num_sms: expected at least 1, got 0"):
            set_num_sms(0)
    assert not fused_a2a._hybrid_ep_buffers


@pytest.mark.parametrize("fp8_dispatch", [False, True])
def test_order_of_nemo_is_no_silent_difference(mesh, fp8_dispatch):
    """Its seventh argument is Megatron's ninth."""
    with pytest.raises(TypeError, match=f"^num_blocks_permute: expected an int or None, got {fp8_dispatch}. The sev"):
        fused_a2a.init_hybrid_ep_buffer(mesh, H, T, 1, 24, 24, fp8_dispatch)
    with pytest.raises(ValueError, match="^fp8_dispatch: expected a bool, got 16"):
        fused_a2a.init_hybrid_ep_buffer(mesh, H, T, 1, 24, 24, None, None, 16)
    fused_a2a.init_hybrid_ep_buffer(mesh, H, T, 1, 24, 24, fp8_dispatch=False)


def test_errors_of_steps(mesh):
    """They come by `check`, or with the next call, and name its argument too."""
    buffer = Buffer(mesh, low_latency_mode=True)

    def run(layer):
        return jax.block_until_ready(jax.jit(lambda *arrays: mapped(mesh, layer)(*arrays))(*draw(mesh)))

    def same_expert(x, topk_idx, weights):
        return buffer.low_latency_dispatch(x, jnp.zeros_like(topk_idx), T, E, use_fp8=False)[1]

    run(same_expert)
    with pytest.raises(CapacityError, match="^topk_idx: expected at most .* rows for an expert.* Name each once.$"):
        buffer.check()

    def no_expert(x, topk_idx, weights):
        return send(buffer, x, jnp.full_like(topk_idx, E), weights)[0]

    run(no_expert)
    with pytest.raises(ExpertIdError, match="^topk_idx: expected -1 or an expert in"):
        run(no_expert)

    def by_fused(x, topk_idx, weights):
        return fused_a2a.fused_dispatch(x, jnp.full_like(topk_idx, E), weights, E, mesh)[0]

    run(by_fused)
    with pytest.raises(ExpertIdError, match="^token_indices: expected -1 or an expert in"):
        run(by_fused)

    def too_many(x, topk_idx, weights):
        return hybrid(mesh, x, jnp.zeros_like(topk_idx), weights, num_permuted_tokens=1)[0]

    run(too_many)
    with pytest.raises(CapacityError, match=r"^num_permuted_tokens: expected at least .* Raise it\.(\n|$)"):
        run(too_many)
    buffer.destroy()
