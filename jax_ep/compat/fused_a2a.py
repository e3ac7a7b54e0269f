"""The functions of Megatron-LM's `megatron.core.transformer.moe.fused_a2a`, and of NeMo Automodel's version of it.

To be called inside `jax.shard_map`, but for those that set something or make and free buffers. JAX differentiates them:
there are no `autograd.Function` classes. `group` is a mesh, whose axis "ep" is used, or `(mesh, axis_name)`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_ep._checks import expect, expect_array, expect_inside_shard_map, expect_int
from jax_ep.communicator import MoECommunicator
from jax_ep.compat._arguments import NAMES, expect_count, expect_matrix, named, refuse, resolve_group
from jax_ep.compat._deepep import Buffer, Group
from jax_ep.compat._uccl import UCCLBuffer
from jax_ep.types import DispatchHandle, DispatchLayout

__all__ = [
    "destroy_buffer",
    "free_buffer",
    "fused_combine",
    "fused_dispatch",
    "get_buffer",
    "get_hidden_bytes",
    "get_uccl_buffer",
    "hybrid_ep_combine",
    "hybrid_ep_dispatch",
    "init_hybrid_ep_buffer",
    "reset_hybrid_ep_buffer",
    "set_deepep_num_sms",
    "set_uccl_num_sms",
    "uccl_fused_combine",
    "uccl_fused_dispatch",
]

Array = jax.Array
_Axis = tuple[jax.sharding.Mesh, str]

_MOST_TOPK = 32  # of a communicator

# What a `Buffer` calls an argument, and what a caller of the fused functions does.
_OF_FUSED = {"topk_idx": "token_indices", "topk_idx.shape[1]": "token_indices.shape[1]"}

_buffers: dict[_Axis, Buffer] = {}
_uccl_buffers: dict[_Axis, UCCLBuffer] = {}


def get_hidden_bytes(x: Array) -> int:
    """Bytes of a row of `x` `[T, H]`, two for each element at least."""
    expect_matrix("x", x)
    return x.shape[1] * max(x.dtype.itemsize, 2)


def get_buffer(group: Group, hidden_bytes: int) -> Buffer:
    """The `Buffer` of a group, one for each. It grows by itself: `hidden_bytes` is accepted."""
    return _buffer_of(Buffer, _buffers, group, hidden_bytes)


def get_uccl_buffer(group: Group, hidden_bytes: int) -> UCCLBuffer:
    """The `UCCLBuffer` of a group, one for each. It grows by itself: `hidden_bytes` is accepted."""
    return _buffer_of(UCCLBuffer, _uccl_buffers, group, hidden_bytes)


def _buffer_of(kind, buffers, group, hidden_bytes):
    expect_int("hidden_bytes", hidden_bytes)
    axis = resolve_group(group)
    if axis not in buffers or buffers[axis].is_destroyed:
        buffers[axis] = kind(axis)
    return buffers[axis]


def free_buffer() -> None:
    """Destroys what `get_buffer` gave; programs that were traced with it fail from then on. NeMo's."""
    _destroy_all(_buffers)


def destroy_buffer() -> None:
    """Destroys what `get_buffer` and `get_uccl_buffer` gave; programs that were traced with it fail from then on."""
    _destroy_all(_buffers)
    _destroy_all(_uccl_buffers)


def _destroy_all(buffers) -> None:
    while buffers:
        buffers.popitem()[1].destroy()


def set_deepep_num_sms(num_sms: int) -> None:
    """How many SMs the ops of `fused_dispatch` and `fused_combine` that are traced from now on may occupy."""
    expect_int("num_sms", num_sms)
    Buffer.set_num_sms(num_sms)


def set_uccl_num_sms(num_sms: int) -> None:
    """The same for `uccl_fused_dispatch` and `uccl_fused_combine`. NeMo's."""
    expect_int("num_sms", num_sms)
    UCCLBuffer.set_num_sms(num_sms)


def fused_dispatch(
    x: Array,
    token_indices: Array,
    token_probs: Array,
    num_experts: int,
    group: Group,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Array, Array, Array, Array, DispatchHandle]:
    """Sends each token once to each rank of its experts, with their ids and probabilities.

    Args:
      x: `[T, H]`. Differentiable.
      token_indices: int32 `[T, K]`, -1 where unused.
      token_probs: float32 `[T, K]`. Differentiable.
      num_experts: E.
      async_finish, allocate_on_comm_stream: accepted; as in Megatron the result is waited for at once.

    Returns:
      recv_x `[C, H]`, C rows of which those without a token are zero; local ids int32 `[C, K]`, -1 where there is none;
      their probabilities float32 `[C, K]`; tokens per local expert, int32 `[L]`; the handle for `fused_combine`.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it.
    """
    buffer = get_buffer(group, get_hidden_bytes(x))
    with named(_OF_FUSED | {"dispatch": "fused_dispatch"}):
        return _fused_dispatch(buffer, x, token_indices, token_probs, num_experts)


def fused_combine(
    x: Array,
    group: Group,
    handle: DispatchHandle,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Array, None]:
    """Returns rows to their tokens and adds them up, without probabilities: experts have applied these.

    Args:
      x: `[C, H]`, a row for each row of `recv_x`. Differentiable.
      handle: from `fused_dispatch`.
      async_finish, allocate_on_comm_stream: accepted.

    Returns:
      The sums `[T, H]`, and None, as in Megatron.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it.
    """
    buffer = get_buffer(group, get_hidden_bytes(x))
    with named(_OF_FUSED | {"combine": "fused_combine"}):
        return buffer.combine(x, handle)[0], None


def uccl_fused_dispatch(
    x: Array,
    token_indices: Array,
    token_probs: Array,
    num_experts: int,
    group: Group,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Array, Array, Array, Array, DispatchHandle]:
    """`fused_dispatch` with a `UCCLBuffer`. NeMo's."""
    buffer = get_uccl_buffer(group, get_hidden_bytes(x))
    with named(_OF_FUSED | {"dispatch": "uccl_fused_dispatch"}):
        return _fused_dispatch(buffer, x, token_indices, token_probs, num_experts)


def uccl_fused_combine(
    x: Array,
    group: Group,
    handle: DispatchHandle,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[Array, None]:
    """`fused_combine` with a `UCCLBuffer`. NeMo's."""
    buffer = get_uccl_buffer(group, get_hidden_bytes(x))
    with named(_OF_FUSED | {"combine": "uccl_fused_combine"}):
        return buffer.combine(x, handle)[0], None


def _fused_dispatch(buffer: Buffer, x, token_indices, token_probs, num_experts):
    expect_array("token_indices", token_indices, (x.shape[0], "K"), jnp.int32)
    expect_array("token_probs", token_probs, token_indices.shape, jnp.float32)
    _, _, num_tokens_per_expert, _, _ = buffer.get_dispatch_layout(token_indices, num_experts)
    recv_x, ids, probs, counts, handle, _ = buffer.dispatch(
        x, num_tokens_per_expert=num_tokens_per_expert, topk_idx=token_indices, topk_weights=token_probs
    )
    return recv_x, ids, probs, counts, handle


# HybridEP: rows arrive permuted, grouped by expert.


@dataclasses.dataclass
class _HybridEPBuffer:
    """A group's communicators, and the most tokens that any call had: those of fewer use the same."""

    buffer: Buffer
    num_tokens: int = 1
    num_sms: int | None = None

    def grow(self, num_tokens: int, num_sms: int | None) -> None:
        self.num_tokens = max(self.num_tokens, num_tokens)
        self.num_sms = self.num_sms if num_sms is None else num_sms


_hybrid_ep_buffers: dict[_Axis, _HybridEPBuffer] = {}


def init_hybrid_ep_buffer(
    group: Group,
    hidden_dim: int,
    num_tokens: int | None = None,
    num_local_experts: int | None = None,
    num_sms_dispatch_api: int | None = None,
    num_sms_combine_api: int | None = None,
    num_blocks_permute: int | None = None,
    num_blocks_unpermute: int | None = None,
    fp8_dispatch: bool = False,
    num_sms_preprocessing_api: int | None = None,
    *,
    seq_len: int | None = None,
) -> None:
    """Says beforehand how many tokens calls will have at most. Where one has more, it is as if that had been said.

    Communicators are made when calls are traced. Each time that a call has more tokens than any before, a new one is.

    Args:
      hidden_dim, num_local_experts: accepted; each call says them by its arguments.
      num_tokens: the most tokens T per rank; `seq_len` in NeMo.
      num_sms_dispatch_api, num_sms_combine_api: SMs that an op may occupy. If both are given, they have to be equal.
      num_blocks_permute, num_blocks_unpermute, num_sms_preprocessing_api: accepted; none of these is a kernel here.
      fp8_dispatch: only False, as in Megatron. By name, if the order is NeMo's, where it comes before those.

    Raises:
      ValueError, TypeError, NotImplementedError: an argument is unusable; the text names it.
    """
    if isinstance(num_blocks_permute, bool):
        raise TypeError(
            f"num_blocks_permute: expected an int or None, got {num_blocks_permute}. The seventh argument in NeMo is "
            "fp8_dispatch: give that by name"
        )
    _expect_counts(
        num_local_experts=num_local_experts,
        num_blocks_permute=num_blocks_permute,
        num_blocks_unpermute=num_blocks_unpermute,
        num_sms_preprocessing_api=num_sms_preprocessing_api,
    )
    expect(isinstance(fp8_dispatch, bool), "fp8_dispatch", "a bool", repr(fp8_dispatch))
    if fp8_dispatch:
        refuse("fp8_dispatch=True", "nor in Megatron. MoECommunicator.dispatch has quant")
    expect_int("hidden_dim", hidden_dim)
    one = (num_tokens is None) is not (seq_len is None)
    expect(one, "num_tokens, seq_len", "one of both", "both" if num_tokens is not None else "neither")
    expect_count("num_tokens", num_tokens)
    expect_count("seq_len", seq_len)
    most = seq_len if num_tokens is None else num_tokens
    assert most is not None
    num_sms = _one_num_sms(num_sms_dispatch_api, num_sms_combine_api)
    _hybrid_ep_buffer(group).grow(most, num_sms)


def reset_hybrid_ep_buffer() -> None:
    """Destroys the communicators of all `hybrid_ep_dispatch`; programs that were traced with them fail from then on."""
    while _hybrid_ep_buffers:
        _hybrid_ep_buffers.popitem()[1].buffer.destroy()


def hybrid_ep_dispatch(
    x: Array,
    routing_map: Array | None,
    probs: Array,
    group: Group,
    num_local_experts: int,
    num_sms_dispatch_api: int | None = None,
    num_sms_combine_api: int | None = None,
    *,
    num_permuted_tokens: int | None = None,
    pad_multiple: int | None = None,
    topk_idx: Array | None = None,
    num_experts: int | None = None,
    fused: bool = False,
    fuse_permute: bool = False,
    num_blocks_permute: int | None = None,
    num_blocks_unpermute: int | None = None,
    num_sms_preprocessing_api: int | None = None,
    topk: int | None = None,
) -> tuple[Array, Array, None, Array, DispatchHandle]:
    """Sends tokens to their experts, where rows arrive grouped by expert: `MoECommunicator.dispatch`, layout `FLAT`.

    What follows `num_sms_combine_api` is in another order in Megatron than in NeMo, so it is given by name.

    Args:
      x: `[T, H]`. Differentiable.
      routing_map: bool `[T, E]`, the experts of each token; or None, with `topk_idx`.
      probs: float32 `[T, E]`. Differentiable.
      num_local_experts: L.
      num_sms_dispatch_api, num_sms_combine_api: SMs that an op may occupy. If both are given, they have to be equal.
      num_permuted_tokens: rows C of the output; None for as many as can come from calls with the most tokens so far. If
        more come, outputs are NaN and the next traced call raises `CapacityError`.
      pad_multiple: each expert's rows are padded with zeros to a multiple of it.
      topk_idx: int32 `[T, K]`, -1 where unused; an expert that a token names again counts once. Not read beside a
        routing map, but for K.
      num_experts: E, if anything.
      topk: the most experts that a token of the routing map has; not Megatron's. Default K of `topk_idx`, else as many
        as can be, which takes memory. A token with more of them makes outputs NaN, and the next traced call raise
        `ExpertIdError`.
      fused, fuse_permute, num_blocks_permute, num_blocks_unpermute, num_sms_preprocessing_api: accepted; it is one op
        in any case.

    Returns:
      Rows `[C, H]`; the probability of each, float32 `[C]`, which experts apply; None; the rows of each local expert
      with their padding, int32 `[L]`; the handle for `hybrid_ep_combine`.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it.
    """
    del fused, fuse_permute
    axis = resolve_group(group)
    expect_inside_shard_map(*axis, "hybrid_ep_dispatch")
    expect_int("num_local_experts", num_local_experts)
    _expect_counts(
        num_blocks_permute=num_blocks_permute,
        num_blocks_unpermute=num_blocks_unpermute,
        num_sms_preprocessing_api=num_sms_preprocessing_api,
    )
    most = num_local_experts * axis[0].shape[axis[1]]
    expect(num_experts in (None, most), "num_experts", f"{most}, num_local_experts on each rank", num_experts)
    expect_matrix("x", x)
    expect_array("probs", probs, (x.shape[0], most), jnp.float32)
    topk_ids = _topk_ids(x.shape[0], most, routing_map, topk_idx, topk)
    num_sms = _one_num_sms(num_sms_dispatch_api, num_sms_combine_api)
    weights = jnp.take_along_axis(probs, jnp.clip(topk_ids, 0, most - 1), axis=1)
    state = _hybrid_ep_buffer(group)
    state.grow(x.shape[0], num_sms)
    names = NAMES[DispatchLayout.FLAT] | {"topk": "topk" if topk_idx is None else "topk_idx.shape[1]"}
    with named(names | {"dispatch": "hybrid_ep_dispatch"}):
        communicator = state.buffer.communicator(
            num_experts=most,
            hidden_size=x.shape[1],
            topk=topk_ids.shape[1],
            max_tokens_per_rank=state.num_tokens,
            max_recv_tokens_per_rank=num_permuted_tokens,
            expert_alignment=1 if pad_multiple is None else pad_multiple,
            output_layout=DispatchLayout.FLAT,
            dtype=x.dtype,
            num_sms=state.num_sms,
        )
        out, handle = communicator.dispatch(x, topk_ids, weights)
    rows_per_expert = out.layout.offsets[1:] - out.layout.offsets[:-1]
    # Without them combine adds up plain rows.
    unweighted = dataclasses.replace(handle, row_weights=None)
    assert handle.row_weights is not None
    return out.tokens, handle.row_weights, None, rows_per_expert, unweighted


def hybrid_ep_combine(
    x: Array,
    handle: DispatchHandle,
    num_permuted_tokens: int | None = None,
    pad_multiple: int | None = None,
    fused: bool = False,
    *,
    fuse_permute: bool = False,
) -> Array:
    """Returns rows to their tokens and adds them up, without probabilities: experts have applied these.

    Args:
      x: `[C, H]`, a row for each row that was dispatched. Differentiable.
      handle: from `hybrid_ep_dispatch`.
      num_permuted_tokens, pad_multiple: None, or those of the dispatch.
      fused, fuse_permute: accepted.

    Returns:
      `[T, H]`.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it.
    """
    del fused, fuse_permute
    communicator = _hybrid_communicator_of(handle)
    capacity, alignment = communicator.capacity, communicator.config.expert_alignment
    given = num_permuted_tokens
    expect(given in (None, capacity), "num_permuted_tokens", f"{capacity}, that of the dispatch", given)
    given = pad_multiple
    expect(given in (None, alignment), "pad_multiple", f"{alignment}, that of the dispatch", given)
    with named(NAMES[DispatchLayout.FLAT] | {"combine": "hybrid_ep_combine"}):
        return communicator.combine(x, handle)


def _hybrid_ep_buffer(group: Group) -> _HybridEPBuffer:
    axis = resolve_group(group)
    if axis not in _hybrid_ep_buffers:
        _hybrid_ep_buffers[axis] = _HybridEPBuffer(Buffer(axis))
    return _hybrid_ep_buffers[axis]


def _hybrid_communicator_of(handle: DispatchHandle) -> MoECommunicator:
    for state in _hybrid_ep_buffers.values():
        communicator = state.buffer.find_communicator_of(handle)
        if communicator is not None:
            return communicator
    raise ValueError("handle: expected one of hybrid_ep_dispatch, got another, or one from before a reset")


def _expect_counts(**counts) -> None:
    """Of arguments that are accepted: one in another's place should not go unnoticed."""
    for name, count in counts.items():
        expect_count(name, count)


def _one_num_sms(of_dispatch: int | None, of_combine: int | None) -> int | None:
    expect_count("num_sms_dispatch_api", of_dispatch)
    expect_count("num_sms_combine_api", of_combine)
    both = of_dispatch is not None and of_combine is not None
    same = not both or of_dispatch == of_combine
    expect(same, "num_sms_combine_api", f"num_sms_dispatch_api={of_dispatch}, since there is one number", of_combine)
    return of_combine if of_dispatch is None else of_dispatch


def _topk_ids(num_tokens: int, num_experts: int, routing_map, topk_idx, topk: int | None) -> Array:
    """Expert ids int32 `[T, K]`, -1 where unused; for a token with more than K, one that is no expert's."""
    if topk_idx is not None:
        expect_array("topk_idx", topk_idx, (num_tokens, "K"), jnp.int32)
        expect(topk in (None, topk_idx.shape[1]), "topk", f"{topk_idx.shape[1]}, the K of topk_idx", topk)
        topk = topk_idx.shape[1]
    if routing_map is None:
        if topk_idx is None:
            raise ValueError("routing_map: expected an array, or topk_idx, got neither")
        is_repeated = jnp.tril(topk_idx[:, :, None] == topk_idx[:, None, :], -1).any(2)
        return jnp.where(is_repeated, -1, topk_idx)
    expect_array("routing_map", routing_map, (num_tokens, num_experts), jnp.bool_)
    topk = min(num_experts, _MOST_TOPK) if topk is None else topk
    expect_int("topk", topk)
    expect(topk <= num_experts, "topk", f"at most the {num_experts} experts", topk)
    # Equal entries come in order of their indices.
    is_chosen, topk_ids = jax.lax.top_k(routing_map.astype(jnp.int32), topk)
    topk_ids = jnp.where(is_chosen > 0, topk_ids, -1)
    has_more = routing_map.sum(1, dtype=jnp.int32) > topk
    return topk_ids.at[:, 0].set(jnp.where(has_more, num_experts, topk_ids[:, 0]))
