"""DeepEP's `Buffer` (V1) on `MoECommunicator`.

A communicator has its sizes for life, a DeepEP buffer learns them from each call. So a `Buffer` makes a communicator
when a call of new sizes is traced, and keeps it: compiled programs go on using it. Under XLA an array is a value: there
is none that is allocated but not yet received, so results need no event to be waited for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp

from jax_ep import _ffi, _quant
from jax_ep._checks import expect, expect_array, expect_inside_shard_map, expect_int
from jax_ep.communicator import MoECommunicator, MoECommunicatorConfig
from jax_ep.compat._arguments import NAMES, expect_count, expect_matrix, named, refuse, resolve_group
from jax_ep.types import DispatchHandle, DispatchLayout, DispatchOutput, MoEMode, QuantConfig

Array = jax.Array
Group = jax.sharding.Mesh | tuple[jax.sharding.Mesh, str]

topk_idx_t = jnp.int32
"""The dtype of `topk_idx`."""

# A row of 16 bytes, the shortest that GPUs move.
_SHORTEST_ROW = 8

_FP8_BLOCK = 128

# Which call gives handles of a layout.
_MADE_BY = {DispatchLayout.RANK_MAJOR: "dispatch", DispatchLayout.EXPERT_MAJOR: "low_latency_dispatch"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EventHandle:
    """What DeepEP records on a stream. Here data orders everything, and there is nothing to record or to hold."""

    def current_stream_wait(self) -> None:
        """Does nothing: what takes a result comes after it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EventOverlap:
    """What calls return as `event`. A pytree, so that a mapped function may return it.

    It stands for no request: the call that returns it returns its results too, and those are awaited. As
    `previous_event` it orders nothing. To order a call behind an array that it does not take, make it depend on it
    (`jax.lax.optimization_barrier`).

    Attributes:
      event: an `EventHandle` if the call had `async_finish=True`, else None.
      extra_tensors: None, or what the caller gave.
    """

    event: EventHandle | None = None
    extra_tensors: Any = None

    def current_stream_wait(self) -> None:
        """Does nothing: the call's results are awaited values already.

        Raises:
          ValueError: the call was not made with `async_finish=True`.
        """
        if self.event is None:
            raise ValueError("event: expected that of a call with async_finish=True, got one without")
        self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_) -> None:
        if self.event is not None:
            self.event.current_stream_wait()


@dataclasses.dataclass(frozen=True)
class Config:
    """DeepEP's tuning of a call, of which `num_sms` alone has a meaning here: there are no chunks.

    Attributes:
      num_sms: SMs that an op may occupy; None for all.
    """

    num_sms: int | None = None
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: memory need not be given, see `Buffer.arena_bytes`."""
        del hidden_bytes, num_ranks
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: there is no network transport."""
        del hidden_bytes, num_ranks
        return 0


class Buffer:
    """DeepEP's `Buffer`, to be built outside jit and called inside `jax.shard_map`.

    Methods, arguments and what is returned are DeepEP's, for arrays of one rank; docs/compat.md says what differs.
    A call of sizes that are new to the Buffer builds a communicator while it is traced. Across processes, all have to
    trace the same calls in the same order, as they do when they run the same program.

    Args:
      group: the mesh, or `(mesh, axis_name)`; the axis is "ep" if it is not named.
      num_nvl_bytes, num_rdma_bytes, num_qps_per_rank: accepted; memory is sized by what is called.
      low_latency_mode: whether the low-latency calls may be made. The others may in either case.
      allow_nvlink_for_low_latency_mode: only True, since there is no other transport.
      allow_mnnvl: accepted, and of no use on one host.
      explicitly_destroy: accepted; `destroy` may always be called, and nothing is freed before it or the end.
      enable_shrink: only False.
      comm: only None.
      use_fabric: accepted, by name alone: some versions of DeepEP have it before `explicitly_destroy`, others nowhere.
      max_tokens_per_rank: the most tokens of a `dispatch`; not DeepEP's. Default as many as each call has, so that
        calls of different sizes have communicators, and memory, of their own.
      max_requests: calls with `async_finish` or `return_recv_hook` that may be in flight; not DeepEP's. With any, such
        calls are done in halves, as by `MoECommunicator.dispatch_async`. Independent batches in one program need one
        each.
      implementation, timeout_s: as for `MoECommunicator`; not DeepEP's.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it.
      NotImplementedError: an argument asks for what is not there.
    """

    num_sms: ClassVar[int | None] = None

    def __init__(
        self,
        group: Group,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: None = None,
        *,
        use_fabric: bool = False,
        max_tokens_per_rank: int | None = None,
        max_requests: int = 0,
        implementation: str | None = None,
        timeout_s: float = 30.0,
    ):
        del num_qps_per_rank, allow_mnnvl, use_fabric
        if comm is not None:
            refuse("comm", "a mesh takes the place of the group, also of an MPI one")
        if enable_shrink:
            refuse("enable_shrink=True", "ranks cannot be masked")
        if not allow_nvlink_for_low_latency_mode:
            refuse("allow_nvlink_for_low_latency_mode=False", "there is no other transport")
        if max_tokens_per_rank is not None:
            expect_int("max_tokens_per_rank", max_tokens_per_rank)
        self.mesh, self.axis_name = resolve_group(group)
        self.group = group
        self.group_size = self.mesh.shape[self.axis_name]
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.max_tokens_per_rank = max_tokens_per_rank
        self._options: dict[str, Any] = dict(
            axis_name=self.axis_name, max_requests=max_requests, implementation=implementation, timeout_s=timeout_s
        )
        self._communicators: dict[MoECommunicatorConfig, MoECommunicator] = {}
        self._destroyed = False

    # Of the Buffer itself.

    @property
    def rank(self) -> Array:
        """This rank's index, int32 `[]`; inside `jax.shard_map`."""
        return jax.lax.axis_index(self.axis_name)

    @property
    def arena_bytes(self) -> int:
        """Bytes that the communicators made so far hold for peers to write to, per GPU. Not DeepEP's."""
        return sum(communicator.arena_bytes for communicator in self._communicators.values())

    @property
    def is_destroyed(self) -> bool:
        """Whether `destroy` was called. Not DeepEP's."""
        return self._destroyed

    def check(self) -> None:
        """Raises what went wrong since the last call, as `MoECommunicator.check` does. Not DeepEP's."""
        for communicator in self._communicators.values():
            with named(_names(communicator)):
                communicator.check()

    def destroy(self) -> None:
        """Destroys all communicators; programs that were traced with them fail from then on."""
        self._destroyed = True
        while self._communicators:
            self._communicators.popitem()[1].destroy()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the kernels for GPUs are installed, all of which are for compute capability 9.0 and above."""
        return importlib.util.find_spec("jax_ep._cuda") is not None

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        """How many SMs the ops of calls that are traced from now on may occupy; all if never called."""
        expect_int("new_num_sms", new_num_sms)
        cls.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event that is over."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """0: memory need not be given, see `arena_bytes`."""
        del num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        return 0

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        """What `set_num_sms` said, for any number of ranks."""
        del num_ranks
        return Config(cls.num_sms)

    @classmethod
    def get_combine_config(cls, num_ranks: int) -> Config:
        """What `set_num_sms` said, for any number of ranks."""
        del num_ranks
        return Config(cls.num_sms)

    # High throughput.

    def get_dispatch_layout(
        self,
        topk_idx: Array,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Array, None, Array, Array, EventOverlap]:
        """How many tokens go where. `dispatch` finds that out by itself; if nothing else reads it, XLA drops it.

        Args:
          topk_idx: int32 `[T, K]`, -1 where unused.
          num_experts: E.
          previous_event, allocate_on_comm_stream: accepted.

        Returns:
          num_tokens_per_rank int32 `[R]`, None, num_tokens_per_expert int32 `[E]`, is_token_in_rank bool `[T, R]`, and
          the event.
        """
        del allocate_on_comm_stream
        _expect_event(previous_event)
        expect_int("num_experts", num_experts)
        expect(num_experts % self.group_size == 0, "num_experts", f"a multiple of {self.group_size} ranks", num_experts)
        expect_array("topk_idx", topk_idx, ("T", "K"), jnp.int32)
        is_used = topk_idx >= 0
        ranks = jnp.where(is_used, topk_idx // (num_experts // self.group_size), -1)
        is_token_in_rank = (ranks[..., None] == jnp.arange(self.group_size, dtype=jnp.int32)).any(1)
        experts = jnp.where(is_used, topk_idx, num_experts)
        num_tokens_per_expert = jnp.zeros((num_experts,), jnp.int32).at[experts].add(1, mode="drop")
        num_tokens_per_rank = is_token_in_rank.sum(0, dtype=jnp.int32)
        return num_tokens_per_rank, None, num_tokens_per_expert, is_token_in_rank, _event(async_finish)

    def dispatch(
        self,
        x: Array | tuple[Array, Array],
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: Array | None = None,
        num_tokens_per_rdma_rank: None = None,
        is_token_in_rank: Array | None = None,
        num_tokens_per_expert: Array | None = None,
        topk_idx: Array | None = None,
        topk_weights: Array | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Array | None, Array | None, Array | None, DispatchHandle | None, EventOverlap]:
        """Sends each token once to each rank of its experts: `MoECommunicator.dispatch` in layout `RANK_MAJOR`.

        Args:
          x: `[T, H]`; or `(elements [T, H], scales [T, H / block])`, quantised, the communicator being bfloat16 then.
          handle: of an earlier `dispatch`, whose routing is used again. Then only `x` goes, and `topk_idx` and
            `topk_weights` must be None.
          num_tokens_per_rank, is_token_in_rank: accepted; the ids alone decide.
          num_tokens_per_rdma_rank: only None.
          num_tokens_per_expert: `[E]`, of which the number of experts is read. Needed without a handle.
          topk_idx: int32 `[T, K]`, -1 where unused. Needed without a handle.
          topk_weights: float32 `[T, K]`. Differentiable, as a plain `x` is.
          expert_alignment: what the returned counts are rounded up to a multiple of.
          num_worst_tokens: rows C of `recv_x`; 0 for as many as can come, R times the most tokens. If more come, see
            `check`.
          config: of which `num_sms` is used.
          previous_event, allocate_on_comm_stream: accepted.
          async_finish: in halves, if the Buffer has `max_requests`.

        Returns:
          recv_x `[C, H]`, grouped by source rank, or with its scales; recv_topk_idx int32 `[C, K]`, local ids, -1 where
          there is none; recv_topk_weights float32 `[C, K]` or None; the tokens of each local expert, int32 `[L]`; the
          handle; the event. With a handle, None for all but the first and last. Rows without a token are zero.

        Raises:
          ValueError, TypeError, NotImplementedError: an argument is unusable; the text names it.
        """
        del num_tokens_per_rank, is_token_in_rank, allocate_on_comm_stream
        self._expect_usable("dispatch")
        _expect_event(previous_event)
        if num_tokens_per_rdma_rank is not None:
            refuse("num_tokens_per_rdma_rank", "all ranks are on one host")
        expect_int("num_worst_tokens", num_worst_tokens, minimum=0)
        expect_int("expert_alignment", expert_alignment)
        _expect_config(config)
        rows, quant, dtype = _rows(x)
        if handle is not None:
            expect(
                topk_idx is None and topk_weights is None, "topk_idx, topk_weights", "None beside a handle", "arrays"
            )
            out = self._dispatch_again(rows, quant, handle, num_worst_tokens, config, async_finish)
            return _recv_x(out), None, None, None, None, _event(async_finish)
        expect_array("num_tokens_per_expert", num_tokens_per_expert, ("E",), jnp.int32)
        expect_array("topk_idx", topk_idx, (rows.shape[0], "K"), jnp.int32)
        assert num_tokens_per_expert is not None and topk_idx is not None
        communicator = self._communicator_for(
            num_experts=num_tokens_per_expert.shape[0],
            hidden_size=rows.shape[1],
            topk=topk_idx.shape[1],
            max_tokens_per_rank=self.max_tokens_per_rank or max(1, rows.shape[0]),
            max_recv_tokens_per_rank=num_worst_tokens or None,
            output_layout=DispatchLayout.RANK_MAJOR,
            dtype=dtype,
            num_sms=self.num_sms if config is None else config.num_sms,
        )
        out, handle = _dispatch(communicator, async_finish, rows, topk_idx, topk_weights, quant=quant)
        counts = -(-out.layout.num_tokens_per_expert // expert_alignment) * expert_alignment
        return _recv_x(out), out.topk_ids, out.topk_weights, counts, handle, _event(async_finish)

    def _dispatch_again(self, rows, quant, handle, num_worst_tokens, config, async_finish) -> DispatchOutput:
        communicator = self._communicator_of(handle, DispatchLayout.RANK_MAJOR)
        capacity = communicator.capacity
        fits = num_worst_tokens in (0, capacity)
        expect(fits, "num_worst_tokens", f"0 or {capacity}, the rows of the handle's dispatch", num_worst_tokens)
        _expect_num_sms(config, communicator)
        return _dispatch(communicator, async_finish, rows, previous_handle=handle, quant=quant)[0]

    def combine(
        self,
        x: Array,
        handle: DispatchHandle,
        topk_weights: Array | None = None,
        bias: Array | tuple[Array, Array] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Array, Array | None, EventOverlap]:
        """Returns rows to their tokens and adds them up, without weights: `MoECommunicator.combine`.

        Args:
          x: `[C, H]`, a row for each row of `recv_x`, in the dtype of what was dispatched; bfloat16 if that was
            quantised. Differentiable.
          handle: of the `dispatch`.
          topk_weights: float32 `[C, K]`, which return as well, each to its token and k; those beside an id of -1 are
            not read. Differentiable.
          bias: None, `[T, H]`, or a pair of those, added in float32 to the sum, which has been rounded by then.
          config: whose `num_sms`, if any, is that of the dispatch.
          previous_event, allocate_on_comm_stream: accepted.
          async_finish: in halves, if the Buffer has `max_requests`; not with `topk_weights`.

        Returns:
          The sums `[T, H]`; the weights `[T, K]`, or None without `topk_weights`; the event.

        Raises:
          ValueError, TypeError: an argument is unusable; the text names it.
        """
        del allocate_on_comm_stream
        self._expect_usable("combine")
        _expect_event(previous_event)
        communicator = self._communicator_of(handle, DispatchLayout.RANK_MAJOR)
        _expect_num_sms(config, communicator)
        rows = (*communicator.rows_shape, communicator.config.hidden_size)
        expect_array("x", x, rows, communicator.config.dtype)
        weights = None
        if topk_weights is None:
            combined = _combine(communicator, async_finish, x, handle)
        else:
            expect_array("topk_weights", topk_weights, (rows[0], communicator.config.topk), jnp.float32)
            axes = frozenset[str]().union(*map(_ffi.varying_axes, jax.tree.leaves((x, topk_weights, handle))))
            x, topk_weights = _ffi.vary(x, axes), _ffi.vary(topk_weights, axes)
            with named(_names(communicator)):
                combined, weights = _rows_and_weights(communicator, x, topk_weights, handle)
        for each in _biases(bias):
            expect_array("bias", each, combined.shape, combined.dtype)
            combined = (combined.astype(jnp.float32) + each.astype(jnp.float32)).astype(combined.dtype)
        return combined, weights, _event(async_finish)

    # Low latency.

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Does nothing: flags hold epochs, and the two kinds of calls share no memory."""
        del num_max_dispatch_tokens_per_rank, hidden, num_experts

    def low_latency_dispatch(
        self,
        x: Array,
        topk_idx: Array,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: None = None,
        dispatch_wait_recv_cost_stats: None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: Array | None = None,
    ) -> tuple[Any, Array, DispatchHandle, EventOverlap, Callable[[], None] | None]:
        """Sends each token to slots of its experts: `MoECommunicator.dispatch` in mode `LOW_LATENCY`.

        Args:
          x: `[T, H]`, at most `num_max_dispatch_tokens_per_rank` tokens; with `use_fp8` H is a multiple of 128.
            Differentiable with `use_fp8=False`.
          topk_idx: int32 `[T, K]`, -1 where unused; no expert twice for a token.
          num_max_dispatch_tokens_per_rank: the same on all ranks.
          num_experts: E.
          cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats: only None.
          use_fp8: quantises to float8_e4m3fn, with a scale for every 128 elements.
          round_scale: scales are powers of two.
          use_ue8m0: and are float8_e8m0fnu, not packed; needs `round_scale`.
          async_finish, return_recv_hook: in halves, if the Buffer has `max_requests`.
          topk_weights: float32 `[T, K]`, not DeepEP's: spares `low_latency_combine`, which gets None for them then,
            a small op.

        Returns:
          recv_x `[L, S, H]`, S slots of each local expert, or with its scales `[L, S, H / 128]`; recv_count int32
          `[L]`, how many of them hold a token, the others anything; the handle; the event; with `return_recv_hook` a
          function that does nothing, else None: the arrays are complete without it.

        Raises:
          ValueError, TypeError, NotImplementedError: an argument is unusable; the text names it.
        """
        self._expect_usable("low_latency_dispatch")
        self._expect_low_latency("low_latency_dispatch")
        if cumulative_local_expert_recv_stats is not None:
            refuse("cumulative_local_expert_recv_stats", "arrays are not written to. Add recv_count to yours")
        if dispatch_wait_recv_cost_stats is not None:
            refuse("dispatch_wait_recv_cost_stats", "waiting is not timed")
        expect(round_scale or not use_ue8m0, "use_ue8m0", "False without round_scale", use_ue8m0)
        expect_matrix("x", x)
        divides = x.shape[1] % _FP8_BLOCK == 0
        expect(divides or not use_fp8, "x.shape[1]", f"a multiple of {_FP8_BLOCK} with use_fp8", x.shape[1])
        expect_array("topk_idx", topk_idx, (x.shape[0], "K"), jnp.int32)
        communicator = self._low_latency(
            num_experts, x.shape[1], topk_idx.shape[1], num_max_dispatch_tokens_per_rank, x.dtype
        )
        scale_dtype = jnp.float8_e8m0fnu if round_scale else jnp.float32
        quant = QuantConfig(block_size=_FP8_BLOCK, scale_dtype=scale_dtype) if use_fp8 else None
        is_async = async_finish or return_recv_hook
        out, handle = _dispatch(communicator, is_async, x, topk_idx, topk_weights, quant=quant)
        recv_x = _recv_x(out)
        if round_scale and not use_ue8m0 and use_fp8:
            recv_x = recv_x[0], _quant.scale_values(recv_x[1])
        count = out.layout.num_tokens_per_expert
        return recv_x, count, handle, _event(async_finish), _arrived if return_recv_hook else None

    def low_latency_combine(
        self,
        x: Array,
        topk_idx: Array,
        topk_weights: Array | None,
        handle: DispatchHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: None = None,
        combine_wait_recv_cost_stats: None = None,
    ) -> tuple[Array, EventOverlap, Callable[[], None] | None]:
        """Returns slots to their tokens and adds them up, times the weights: `MoECommunicator.combine`.

        Weights have to be where the experts are before rows return. So one more small op takes them there, unless
        `low_latency_dispatch` was given them.

        Args:
          x: `[L, S, H]`, in the dtype of what was dispatched. Differentiable.
          topk_idx: int32 `[T, K]`, those of the dispatch.
          topk_weights: float32 `[T, K]`, differentiable; None if the dispatch was given them.
          handle: of the `low_latency_dispatch`.
          use_logfmt, zero_copy: only False.
          async_finish, return_recv_hook: in halves, if the Buffer has `max_requests`.
          out, combine_wait_recv_cost_stats: only None.

        Returns:
          The sums `[T, H]`; the event; with `return_recv_hook` a function that does nothing, else None.

        Raises:
          ValueError, TypeError, NotImplementedError: an argument is unusable; the text names it.
        """
        self._expect_usable("low_latency_combine")
        self._expect_low_latency("low_latency_combine")
        if use_logfmt:
            refuse("use_logfmt=True", "rows return in their own dtype")
        if zero_copy:
            refuse("zero_copy=True", "there is no buffer to write the rows to")
        if out is not None:
            refuse("out", "arrays are not written to")
        if combine_wait_recv_cost_stats is not None:
            refuse("combine_wait_recv_cost_stats", "waiting is not timed")
        communicator = self._communicator_of(handle, DispatchLayout.EXPERT_MAJOR)
        config = communicator.config
        expect_array("x", x, (*communicator.rows_shape, config.hidden_size), config.dtype)
        expect_array("topk_idx", topk_idx, (handle.num_tokens, config.topk), jnp.int32)
        if handle.row_weights is None:
            expect_array("topk_weights", topk_weights, (handle.num_tokens, config.topk), jnp.float32)
            handle = self._with_weights(config, topk_idx, topk_weights, handle)
        else:
            expect(topk_weights is None, "topk_weights", "None, since low_latency_dispatch was given some", "an array")
        combined = _combine(communicator, async_finish or return_recv_hook, x, handle)
        return combined, _event(async_finish), _arrived if return_recv_hook else None

    # What there is none of.

    def internode_dispatch(self, *args, **kwargs) -> NoReturn:
        refuse("internode_dispatch", "all ranks are on one host")

    def internode_combine(self, *args, **kwargs) -> NoReturn:
        refuse("internode_combine", "all ranks are on one host")

    def get_comm_stream(self) -> NoReturn:
        refuse("get_comm_stream", "streams are XLA's")

    def get_local_buffer_tensor(self, dtype, size=None, offset: int = 0, use_rdma_buffer: bool = False) -> NoReturn:
        refuse("get_local_buffer_tensor", "memory that peers write to is not an array")

    def get_next_low_latency_combine_buffer(self, handle) -> NoReturn:
        refuse("get_next_low_latency_combine_buffer", "memory that peers write to is not an array")

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> NoReturn:
        refuse("low_latency_update_mask_buffer", "ranks cannot be masked")

    def low_latency_query_mask_buffer(self, mask_status) -> NoReturn:
        refuse("low_latency_query_mask_buffer", "ranks cannot be masked")

    def low_latency_clean_mask_buffer(self) -> NoReturn:
        refuse("low_latency_clean_mask_buffer", "ranks cannot be masked")

    # For the modules beside this one, and for whoever wants more than DeepEP offers.

    def communicator(self, **sizes) -> MoECommunicator:
        """The communicator of these arguments of `MoECommunicatorConfig`, made if there is none yet. Not DeepEP's."""
        if self._destroyed:
            raise ValueError("Buffer: expected a live one, got one after destroy()")
        config = MoECommunicatorConfig(**self._options, **sizes)
        config = dataclasses.replace(config, dtype=jnp.dtype(config.dtype))  # for equal ones to have equal hashes
        if config not in self._communicators:
            self._communicators[config] = MoECommunicator(self.mesh, config)
        return self._communicators[config]

    def _communicator_for(self, **sizes) -> MoECommunicator:
        """The same for a call of DeepEP's, whose caller knows other names."""
        low_latency = sizes.get("mode") is MoEMode.LOW_LATENCY
        with named(NAMES[DispatchLayout.EXPERT_MAJOR if low_latency else DispatchLayout.RANK_MAJOR]):
            return self.communicator(**sizes)

    def _communicator_of(self, handle: DispatchHandle, layout: DispatchLayout) -> MoECommunicator:
        """The communicator that made `handle`, which has to be one of this layout."""
        communicator = self.communicator_of(handle)
        kind = handle.layout.kind
        expect(kind is layout, "handle", f"one of {_MADE_BY[layout]}", f"one of {_MADE_BY.get(kind, kind)}")
        return communicator

    def communicator_of(self, handle: DispatchHandle) -> MoECommunicator:
        """The communicator that made `handle`. Not DeepEP's."""
        communicator = self.find_communicator_of(handle)
        if communicator is None:
            raise ValueError("handle: expected one of this Buffer, got another's, or one from before destroy()")
        return communicator

    def find_communicator_of(self, handle: DispatchHandle) -> MoECommunicator | None:
        """The same, or None if this Buffer made none that did. Not DeepEP's."""
        if not isinstance(handle, DispatchHandle):
            raise TypeError(f"handle: expected a DispatchHandle, got {type(handle).__name__}")
        all_of_them = self._communicators.values()
        return next((each for each in all_of_them if each._spec.communicator_id == handle.communicator_id), None)

    def _low_latency(self, num_experts: int, hidden: int, topk: int, max_tokens: int, dtype) -> MoECommunicator:
        return self._communicator_for(
            num_experts=num_experts,
            hidden_size=hidden,
            topk=topk,
            max_tokens_per_rank=max_tokens,
            mode=MoEMode.LOW_LATENCY,
            dtype=dtype,
            num_sms=self.num_sms,
        )

    def _with_weights(self, config: MoECommunicatorConfig, topk_idx, topk_weights, handle) -> DispatchHandle:
        """`handle` with weights beside its rows: where they go depends on the ids alone, so they go with empty rows."""
        sizes = config.num_experts, _SHORTEST_ROW, config.topk, config.max_tokens_per_rank
        communicator = self._low_latency(*sizes, jnp.bfloat16)
        nothing = jnp.zeros((handle.num_tokens, _SHORTEST_ROW), jnp.bfloat16)
        _, weighted = communicator.dispatch(nothing, topk_idx, topk_weights)
        return dataclasses.replace(handle, row_weights=weighted.row_weights)

    def _expect_usable(self, op: str) -> None:
        """Before a communicator is made, which a misplaced call should not."""
        if self._destroyed:
            raise ValueError(f"{op}: expected a live Buffer, got one after destroy()")
        expect_inside_shard_map(self.mesh, self.axis_name, op)

    def _expect_low_latency(self, op: str) -> None:
        expect(self.low_latency_mode, op, "a Buffer with low_latency_mode=True", self.low_latency_mode)


def _expect_event(previous_event) -> None:
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise TypeError(f"previous_event: expected an EventOverlap or None, got {type(previous_event).__name__}")


def _expect_config(config) -> None:
    if config is None:
        return
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a Config or None, got {type(config).__name__}")
    expect_count("config.num_sms", config.num_sms)


def _expect_num_sms(config: Config | None, communicator: MoECommunicator) -> None:
    _expect_config(config)
    if config is not None and config.num_sms is not None:
        wanted = communicator.config.num_sms
        expect(config.num_sms == wanted, "config.num_sms", f"{wanted}, that of the handle's dispatch", config.num_sms)


def _names(communicator: MoECommunicator) -> dict[str, str]:
    """None for one of a layout that no call here has: who made that has given its own arguments."""
    layout = communicator.config.output_layout
    return NAMES[layout] if layout in _MADE_BY else {}


def _dispatch(communicator: MoECommunicator, is_async: bool, *args, **kwargs) -> tuple[DispatchOutput, DispatchHandle]:
    with named(_names(communicator)):
        if is_async and communicator.config.max_requests:
            return communicator.dispatch_async(*args, **kwargs).wait()
        return communicator.dispatch(*args, **kwargs)


def _combine(communicator: MoECommunicator, is_async: bool, y: Array, handle: DispatchHandle) -> Array:
    with named(_names(communicator)):
        if is_async and communicator.config.max_requests:
            return communicator.combine_async(y, handle).wait()
        return communicator.combine(y, handle)


def _biases(bias) -> tuple:
    if not isinstance(bias, tuple):
        return () if bias is None else (bias,)
    expect(len(bias) == 2, "bias", "an array, or a pair of them", f"{len(bias)} arrays")
    return bias


def _event(async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if async_finish else None)


def _arrived() -> None:
    """The receiving hook."""


def _rows(x) -> tuple[Array, QuantConfig | None, Any]:
    """The rows that travel, how they are quantised, and the dtype in which rows return."""
    if not isinstance(x, tuple):
        expect_matrix("x", x)
        return x, None, x.dtype
    expect(len(x) == 2, "x", "an array, or (elements, scales)", f"{len(x)} arrays")
    elements, scales = x
    expect_matrix("x[0]", elements)
    expect_matrix("x[1]", scales, (elements.shape[0], "H / block"))
    hidden, num_blocks = elements.shape[1], scales.shape[1]
    divides = num_blocks > 0 and hidden % num_blocks == 0
    expect(divides, "x[1]", f"scales for equal blocks of {hidden} elements", f"{num_blocks} scales")
    quant = QuantConfig(elements.dtype, hidden // num_blocks, scales.dtype, scales)
    return elements, quant, jnp.bfloat16


def _recv_x(out: DispatchOutput):
    return out.tokens if out.quant is None else (out.tokens, out.quant.scales)


def _dispatch_along(communicator: MoECommunicator, handle: DispatchHandle, x: Array, weights: Array):
    out, _ = communicator.dispatch(x, weights=weights, previous_handle=handle)
    return out.tokens, out.topk_weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows_and_weights(communicator: MoECommunicator, y: Array, topk_weights: Array, handle: DispatchHandle):
    """Sums `[T, H]` of rows and the weights `[T, K]` beside them: the backward pass of a dispatch, which it is for."""
    config, axes = communicator.config, _ffi.varying_axes(y)
    x = _ffi.vary(jnp.zeros((handle.num_tokens, config.hidden_size), config.dtype), axes)
    weights = _ffi.vary(jnp.zeros((handle.num_tokens, config.topk), jnp.float32), axes)
    _, pull = jax.vjp(functools.partial(_dispatch_along, communicator, handle), x, weights)
    return pull((y, topk_weights))


def _forward(communicator, y, topk_weights, handle):
    return _rows_and_weights(communicator, y, topk_weights, handle), handle


def _backward(communicator, handle, gradients):
    return *_dispatch_along(communicator, handle, *gradients), None


_rows_and_weights.defvjp(_forward, _backward)
