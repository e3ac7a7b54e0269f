"""`MoECommunicator`: what a user holds."""

from __future__ import annotations

import atexit
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _bootstrap, _combine, _dispatch, _ffi, _quant
from jax_ep._checks import expect, expect_array, expect_dtype, expect_inside_shard_map, expect_int
from jax_ep._config import MoECommunicatorConfig, moe_shape, resolve_config
from jax_ep._placement import ExpertPlacement, expect_placement, to_physical
from jax_ep._processes import communicator_id, give_back_id
from jax_ep._shapes import MoEShape
from jax_ep.types import (
    CapacityError,
    CombineRequest,
    DispatchHandle,
    DispatchLayout,
    DispatchLayoutInfo,
    DispatchOutput,
    DispatchRequest,
    ErrorCode,
    ExpertIdError,
    PeerTimeoutError,
    QuantConfig,
    QuantOutput,
)


@dataclasses.dataclass(frozen=True)
class _OpSpec:
    """What the ops need to know of their communicator; hashable, since it is static under jit."""

    communicator_id: int
    axis_name: str
    shape: MoEShape
    dtype: Any
    drop_overflow: bool
    communicator: MoECommunicator
    is_reference: bool

    def route_tables_size(self, num_tokens: int) -> int:
        connection = self.communicator._connection
        assert connection is not None
        return connection.native_shape.route_tables_size(num_tokens)

    def report_error(self, code, rank, got) -> None:
        self.communicator._reference_error = (int(code), int(rank), int(got))


class MoECommunicator:
    """Moves the tokens of a mixture-of-experts layer to their experts and back, along one mesh axis.

    Build it once, outside jit, on all processes of the mesh alike; call `dispatch` and `combine`, or `dispatch_async`
    and `combine_async`, which cut them in halves, inside `jax.shard_map` over the same mesh. Expert e lives on rank
    `e // (num_experts // R)` of the axis's R ranks.

    Args:
      mesh: the `jax.sharding.Mesh` that the calls will be mapped over: with the same devices in the same order.
        Positions on its other axes form independent groups.
      config: all other arguments in one `MoECommunicatorConfig`, instead of by keyword.
      axis_name: the expert-parallel mesh axis.
      num_experts: E, over all ranks; divisible by R. With a placement, slots: see `dispatch`.
      hidden_size: H, elements per token. On GPUs a row must be a multiple of 16 bytes.
      topk: K, experts per token, 1 to 32.
      max_tokens_per_rank: the most tokens T that a rank dispatches in one call; in mode LOW_LATENCY on GPUs such that
        all ranks together name at most 65,536 experts.
      mode: `MoEMode.HIGH_THROUGHPUT`, the default, for training and prefill; `MoEMode.LOW_LATENCY` for decoding.
      output_layout: a `DispatchLayout`; default `FLAT`, in mode LOW_LATENCY `EXPERT_MAJOR`, which needs that mode.
      max_recv_tokens_per_rank: C, rows of the receive buffer; default the worst case, so that nothing can be
        dropped. Balanced routing needs about T * K rows for `FLAT`. Not for `EXPERT_MAJOR`, whose L * S slots only
        overflow if tokens name the same expert more than once.
      overflow: what happens to rows beyond C. "error", the default: all outputs of the step are NaN on all ranks, and
        the next call or `check()` raises `CapacityError`. "drop": the last rows are left out of outputs and gradients,
        and counted in `num_dropped`.
      expert_alignment: each expert's rows start at a multiple of this (`FLAT`); default 1. With overflow "error" the
        rows between, and up to the next multiple after the last, count among those that C has to hold.
      dtype: of the tokens: bfloat16, the default, float16, float32 or float64.
      max_requests: requests of `dispatch_async` and `combine_async` that may be in flight at a time (started and not
        yet waited for); on GPUs each takes another arena. Default 0: none.
      implementation: "cuda", "cpu" or "reference" (pure JAX); default by the mesh's platform.
      num_sms: SMs of a GPU that an op may occupy; default all, or what the environment variable JAX_EP_NUM_SMS says.
        The routing of a fresh dispatch may take up to 33 more, for a short time.
      dispatch_blocks: (sending, receiving) thread blocks of dispatch, one per SM; default a split of `num_sms`, or
        what JAX_EP_DISPATCH_BLOCKS says, as in "24,100".
      combine_blocks: the same for combine; JAX_EP_COMBINE_BLOCKS.
      timeout_s: seconds that a rank waits for a peer before the op fails with `PeerTimeoutError`, and that a process
        waits here for the others; default 30.

    Attributes:
      mesh: as given.
      config: the arguments, with defaults and environment variables filled in.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came. ValueError
        also if processes build different communicators at the same time.
      NotImplementedError: this installation has no backend for the mesh's devices.
      RuntimeError: on all processes, if one does not come in time, was given different arguments, cannot reach
        another's memory or has none.
    """

    def __init__(self, mesh: jax.sharding.Mesh, config: MoECommunicatorConfig | None = None, **arguments):
        if config is not None and (arguments or not isinstance(config, MoECommunicatorConfig)):
            raise TypeError(
                f"config: expected one MoECommunicatorConfig and no other argument, got {type(config).__name__} "
                f"and {sorted(arguments)}"
            )
        self._destroyed = False
        self._connection: _bootstrap.Connection | None = None
        self._reference_error: tuple[int, int, int] | None = None
        self.config = resolve_config(mesh, config or MoECommunicatorConfig(**arguments))
        self.mesh = mesh
        self._shape = moe_shape(mesh, self.config)
        # What ids stand for in errors: slots, or the logical experts of the last placement that was traced.
        self._num_named_experts = self._shape.num_experts
        self._spec = _OpSpec(
            communicator_id=communicator_id(mesh, self.config.axis_name),
            axis_name=self.config.axis_name,
            shape=self._shape,
            dtype=self.config.dtype,
            drop_overflow=self.config.overflow == "drop",
            communicator=self,
            is_reference=self.config.implementation == "reference",
        )
        if not self._spec.is_reference:
            self._connect()
        # Not for the sake of memory: peers must stop using ours before this process ends.
        atexit.register(self.destroy)

    def _connect(self) -> None:
        try:
            self._connection = _bootstrap.Connection(
                self.mesh, self.config, id=self._spec.communicator_id, shape=self._shape
            )
        except BaseException:
            # The others, who learn of it or wait in vain, will count from here too when all build one again.
            give_back_id(self.mesh, self.config.axis_name)
            raise

    @property
    def num_ranks(self) -> int:
        """R, the ranks of the expert-parallel axis."""
        return self._shape.num_ranks

    @property
    def num_local_experts(self) -> int:
        """L = E / R."""
        return self._shape.num_local_experts

    @property
    def capacity(self) -> int:
        """C, the rows of `DispatchOutput.tokens`; for `EXPERT_MAJOR` L * S."""
        return self._shape.capacity

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """`(C,)`, or `(L, S)` for `EXPERT_MAJOR`: what `DispatchOutput.tokens` has before its last dimension."""
        shape = self._shape
        if shape.layout is DispatchLayout.EXPERT_MAJOR:
            return shape.num_local_experts, shape.slots_per_expert
        return (shape.capacity,)

    @property
    def arena_bytes(self) -> int:
        """Bytes held for peers to write to, per GPU; on CPU, the address space reserved per process."""
        return 0 if self._connection is None else self._connection.native.arena_bytes

    def dispatch(
        self,
        x: jax.Array,
        topk_ids: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        previous_handle: DispatchHandle | None = None,
        quant: QuantConfig | None = None,
        placement: ExpertPlacement | None = None,
    ) -> tuple[DispatchOutput, DispatchHandle]:
        """Sends each token to the ranks of its experts. Call inside `jax.shard_map`.

        Args:
          x: `[T, H]`, this rank's tokens, in the communicator's dtype or, with `quant.scales`, in `quant.dtype`.
            Differentiable; with `quant` by way of `jax_ep.dequantize`, and not if it is quantised already.
          topk_ids: int32 `[T, K]`, the experts of each token, -1 where unused. An expert named twice counts twice.
          weights: float32 `[T, K]`, routing weights, which `combine` applies. Differentiable. Without them,
            `combine` adds the rows unweighted.
          previous_handle: reuses its routing, and its weights unless new ones are given, instead of `topk_ids`.
          quant: sends quantised rows, and their scales along: with bfloat16 about half the bytes.
          placement: where experts and their replicas are. Then `topk_ids` are logical experts, of any number, and the
            communicator's `num_experts` are slots; `jax_ep.eplb.to_physical` says which replica a token goes to. What
            dispatch returns is by slot. Not beside `previous_handle`, whose routing has been through its placement.

        Returns:
          What this rank received, and the handle for `combine` and for later dispatches.

        Raises:
          ValueError, TypeError: at trace time, naming the argument, what was expected and what came.
          CapacityError, ExpertIdError, PeerTimeoutError: an earlier step failed, see `check`.
        """
        return self._received(
            self._checked_dispatch("dispatch", x, topk_ids, weights, previous_handle, quant, placement)
        )

    def dispatch_async(
        self,
        x: jax.Array,
        topk_ids: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        previous_handle: DispatchHandle | None = None,
        quant: QuantConfig | None = None,
        placement: ExpertPlacement | None = None,
    ) -> DispatchRequest:
        """Starts a dispatch: `dispatch_async(...).wait()` is `dispatch(...)`, gradients included.

        What is computed in between, without the result, hides the time that rows travel:

            request = comm.dispatch_async(x, topk_ids, weights)
            shared = shared_expert(x)
            out, handle = request.wait()

        Nothing but data orders the halves and what is around them:

        - Ranks start a communicator's requests in the same order, as they do when they run the same program. At most
          `max_requests`, of this and of `combine_async`, are in flight at a time, and those started first are waited
          for first. What counts is what depends on what, not the order of lines: XLA may start a request that needs
          nothing of an earlier one before that has been received. So allow as many as are independent of each other. A
          request may be carried through a scan: start the next one, wait for this one, with `max_requests=2`.
        - The ticket is a hint. Where XLA merges equal starts, takes one out of a loop, or `jax.checkpoint` recomputes a
          wait, the receiving half finds nothing that was sent for it, and does the whole op. So it does for one
          request more than `max_requests`, unless sending halves run on a stream of their own: then some ranks may take
          it for one too many and others not, and the op ends in `PeerTimeoutError`.
        - A request that is not waited for is not even started, since XLA drops it, unless its ticket is used.

        On GPUs, in mode HIGH_THROUGHPUT, the sending half runs beside compute with jax 0.11.1 or newer and
        `xla_gpu_enable_command_buffer=""`, since command buffers replay one kernel after the other. It takes a few SMs
        only, see `dispatch_blocks` and `combine_blocks`. In mode LOW_LATENCY nothing but the wait for late peers is
        hidden. On CPUs the receiving half does all of it.

        Takes what `dispatch` takes, and raises what it raises.

        Returns:
          A request, whose `wait()` returns what `dispatch` does.

        Raises:
          ValueError: besides, if `max_requests` is 0.
        """
        self._expect_requests("dispatch_async")
        request = self._checked_dispatch("dispatch_async", x, topk_ids, weights, previous_handle, quant, placement)
        routing = None if previous_handle is None else previous_handle.routing
        ticket = _dispatch.start(self._spec, request.x, request.weights, request.topk_ids, routing, request.quant)
        return dataclasses.replace(request, ticket=ticket)

    def _wait_for_dispatch(self, request: DispatchRequest) -> tuple[DispatchOutput, DispatchHandle]:
        self._expect_usable("wait")
        return self._received(request)

    def _checked_dispatch(self, op: str, x, topk_ids, weights, previous_handle, quant, placement) -> DispatchRequest:
        """What a dispatch is given, as its op takes it: a request without a ticket."""
        self._expect_usable(op)
        shape = self._shape
        if quant is not None:
            quant = self._checked_quant(quant)
        came_quantised = quant is not None and quant.scales is not None
        expect_array("x", x, ("T", shape.hidden_size), quant.dtype if came_quantised else self.config.dtype)
        num_tokens = x.shape[0]
        expect(num_tokens <= shape.max_tokens_per_rank, "x", f"at most {shape.max_tokens_per_rank} tokens", num_tokens)
        if came_quantised:
            num_blocks = shape.hidden_size // quant.block_size
            expect_array("quant.scales", quant.scales, (num_tokens, num_blocks), quant.scale_dtype)
        if weights is not None:
            expect_array("weights", weights, (num_tokens, shape.topk), jnp.float32)
        if previous_handle is not None:
            expect(topk_ids is None, "topk_ids", "None beside previous_handle", "an array")
            expect(placement is None, "placement", "None beside previous_handle", "an ExpertPlacement")
            self._expect_own_handle("previous_handle", previous_handle)
            expect(previous_handle.num_tokens == num_tokens, "x", f"{previous_handle.num_tokens} tokens", num_tokens)
        else:
            if topk_ids is None:
                raise ValueError("topk_ids: expected an array, or previous_handle, got neither")
            expect_array("topk_ids", topk_ids, (num_tokens, shape.topk), jnp.int32)
            self._num_named_experts = shape.num_experts
            if placement is not None:
                topk_ids = self._physical(topk_ids, placement)
            axes = _varying_axes(topk_ids) | {self.config.axis_name}
            topk_ids = _ffi.vary(_at_least_one_token(topk_ids, -1), axes)
        routed_by = topk_ids if previous_handle is None else previous_handle
        x, weights, quant = self._vary_alike(x, weights, quant, routed_by)
        return DispatchRequest(x, weights, topk_ids, previous_handle, quant, None, num_tokens, self)

    def _physical(self, topk_ids, placement) -> jax.Array:
        """The slots of logical experts."""
        expect_placement("placement", placement)
        num_slots = self._shape.num_experts
        expect(placement.num_slots == num_slots, "placement", f"{num_slots} slots", placement.num_slots)
        self._num_named_experts = placement.num_experts
        rank = jax.lax.axis_index(self.config.axis_name)
        return to_physical(topk_ids, placement, rank)

    def _received(self, request: DispatchRequest) -> tuple[DispatchOutput, DispatchHandle]:
        """The op, or with a ticket its receiving half."""
        spec, handle = self._spec, request.previous_handle
        x, weights, quant, ticket = request.x, request.weights, request.quant, request.ticket
        # The token that stands in for none is a constant, by which JAX does not see a differentiated program.
        fill = request.num_tokens == 0
        if handle is not None:
            received = _dispatch.dispatch_cached(spec, x, weights, handle.routing, quant, fill, ticket)
            return self._output_and_handle(handle, *received)
        routed, received = _dispatch.dispatch(spec, x, weights, request.topk_ids, quant, fill, ticket)
        routing, num_tokens_per_expert, offsets, num_dropped, recv_topk_ids = routed
        layout = DispatchLayoutInfo(self._shape.layout, num_tokens_per_expert, offsets, self.config.axis_name)
        handle = DispatchHandle(
            routing, None, layout, num_dropped, recv_topk_ids, request.num_tokens, spec.communicator_id
        )
        return self._output_and_handle(handle, *received)

    def _checked_quant(self, quant) -> QuantConfig:
        if not isinstance(quant, QuantConfig):
            raise TypeError(f"quant: expected a QuantConfig, got {type(quant).__name__}")
        hidden_size = self._shape.hidden_size
        dtype = expect_dtype("quant.dtype", quant.dtype, _quant.QMAX)
        scale_dtype = expect_dtype("quant.scale_dtype", quant.scale_dtype, _quant.SCALE_DTYPES)
        expect_int("quant.block_size", quant.block_size)
        blocks = f"a divisor of the hidden size {hidden_size}"
        expect(hidden_size % quant.block_size == 0, "quant.block_size", blocks, quant.block_size)
        if self.config.implementation == "cuda":
            expect(hidden_size % 32 == 0, "quant", "a hidden size of a multiple of 32 on CUDA", hidden_size)
        # A quantised row travels in the place of a plain one.
        saved = hidden_size * (jnp.dtype(self.config.dtype).itemsize - 1)
        scale_bytes = hidden_size // quant.block_size * scale_dtype.itemsize
        fits = f"blocks whose scales take at most the {saved} bytes that quantising a row saves"
        expect(scale_bytes <= saved, "quant.block_size", fits, f"{quant.block_size}, {scale_bytes} bytes")
        return dataclasses.replace(quant, dtype=dtype, scale_dtype=scale_dtype)

    def _vary_alike(self, x, weights, quant, routed_by):
        """The first three over the axes of all that they meet in an op."""
        scales = None if quant is None else quant.scales
        axes = _varying_axes((x, weights, scales, routed_by)) | {self.config.axis_name}

        def vary(array):
            return None if array is None else _ffi.vary(_at_least_one_token(array, 0), axes)

        if scales is not None:
            x, scales = jax.lax.stop_gradient((x, scales))
            quant = dataclasses.replace(quant, scales=vary(scales))
        return vary(x), vary(weights), quant

    def _output_and_handle(self, handle: DispatchHandle, tokens, row_weights, scales, straight_through):
        rank_major = handle.layout.kind is DispatchLayout.RANK_MAJOR
        if row_weights is not None:
            if rank_major:
                row_weights = jnp.where(handle.topk_ids >= 0, row_weights, 0)
            handle = dataclasses.replace(handle, row_weights=row_weights)
        quant = None
        if scales is not None:
            rows = None if straight_through is None else self._by_expert(straight_through)
            quant = QuantOutput(self._by_expert(scales), rows)
        out = DispatchOutput(
            tokens=self._by_expert(tokens),
            layout=handle.layout,
            num_dropped=handle.num_dropped,
            topk_ids=handle.topk_ids,
            topk_weights=handle.row_weights if rank_major else None,
            quant=quant,
        )
        return out, handle

    def _by_expert(self, rows: jax.Array) -> jax.Array:
        """`[C, ...]` as users see it."""
        return rows.reshape(*self.rows_shape, *rows.shape[1:])

    def combine(self, y: jax.Array, handle: DispatchHandle) -> jax.Array:
        """Returns the experts' rows to their tokens and sums them. Call inside `jax.shard_map`.

        Args:
          y: `[C, H]`, or `[L, S, H]` for `EXPERT_MAJOR`, a row for each row of the dispatch output, in the
            communicator's dtype. Differentiable. Rows without a token are not read.
          handle: from the `dispatch` that made those rows.

        Returns:
          `[T, H]`, for `FLAT` and `EXPERT_MAJOR` the sum of each token's rows, times its weights if dispatch was given
          any; for `RANK_MAJOR` the plain sum over ranks. Sums are kept in float32, those of float64 rows in float64. A
          token without experts gets zeros.

        Raises:
          ValueError, TypeError: at trace time, naming the argument, what was expected and what came.
          CapacityError, ExpertIdError, PeerTimeoutError: an earlier step failed, see `check`.
        """
        return self._combined(self._checked_combine("combine", y, handle))

    def combine_async(self, y: jax.Array, handle: DispatchHandle) -> CombineRequest:
        """Starts a combine: `combine_async(...).wait()` is `combine(...)`. All else is as for `dispatch_async`.

        Takes what `combine` takes, and raises what it raises.

        Returns:
          A request, whose `wait()` returns what `combine` does.

        Raises:
          ValueError: besides, if `max_requests` is 0.
        """
        self._expect_requests("combine_async")
        request = self._checked_combine("combine_async", y, handle)
        num_tokens = max(1, request.num_tokens)
        ticket = _combine.start(self._spec, request.y, request.row_weights, request.routing, num_tokens)
        return dataclasses.replace(request, ticket=ticket)

    def _wait_for_combine(self, request: CombineRequest) -> jax.Array:
        self._expect_usable("wait")
        return self._combined(request)

    def _checked_combine(self, op: str, y, handle) -> CombineRequest:
        """What a combine is given, as its op takes it: a request without a ticket."""
        self._expect_usable(op)
        self._expect_own_handle("handle", handle)
        expect_array("y", y, (*self.rows_shape, self._shape.hidden_size), self.config.dtype)
        axes = _ffi.varying_axes(y) | _varying_axes(handle)
        y = _ffi.vary(y.reshape(self._shape.capacity, -1), axes)
        weighted = handle.row_weights is not None and handle.layout.kind is not DispatchLayout.RANK_MAJOR
        row_weights = _ffi.vary(handle.row_weights, axes) if weighted else None
        return CombineRequest(y, row_weights, handle.routing, None, handle.num_tokens, self)

    def _combined(self, request: CombineRequest) -> jax.Array:
        """The op, or with a ticket its receiving half."""
        operands = request.y, request.row_weights, request.routing, max(1, request.num_tokens)
        return _combine.combine(self._spec, *operands, request.ticket)[: request.num_tokens]

    def check(self) -> None:
        """Raises what went wrong on this process's devices since the last call.

        Ops do not stop the program when routing fails: they give NaN. Call this where the program waits for a
        step's result anyway; it does not wait itself, but for `implementation="reference"`, which reports by callback.

        Raises:
          CapacityError: a rank was sent more rows than it has capacity for, with overflow="error".
          ExpertIdError: topk_ids held an id that is neither -1 nor an expert.
          PeerTimeoutError: a peer did not come; only `destroy` is left to do.
        """
        if self._spec.is_reference:
            jax.effects_barrier()  # its reports come by callback
        if self._connection is not None:
            code, rank, _, got, timeout_text = self._connection.native.take_error()
        elif self._reference_error is not None:
            (code, rank, got), self._reference_error = self._reference_error, None
            timeout_text = ""
        else:
            return
        if code == ErrorCode.OVERFLOW and self._shape.layout is DispatchLayout.EXPERT_MAJOR:
            raise CapacityError(
                f"topk_ids: expected at most {self._shape.slots_per_expert} rows for an expert, got {got} on rank "
                f"{rank}, where tokens name one more than once; the outputs of that step are NaN on all ranks. Name "
                'each once, or choose overflow="drop".'
            )
        if code == ErrorCode.OVERFLOW:
            raise CapacityError(
                f"max_recv_tokens_per_rank: expected at least {got}, which rank {rank} needed, got {self.capacity}; "
                'the outputs of that step are NaN on all ranks. Raise it, or choose overflow="drop".'
            )
        if code == ErrorCode.BAD_EXPERT_ID:
            raise ExpertIdError(
                f"topk_ids: expected -1 or an expert in [0, {self._num_named_experts}), got {got} other entries on "
                f"rank {rank}; the outputs of that step are NaN on all ranks."
            )
        if code == ErrorCode.TIMEOUT:
            raise PeerTimeoutError(timeout_text)

    def destroy(self) -> None:
        """Frees the communicator's memory and connections; programs that still call it get an error. Idempotent.

        Wait for running programs first: one that is left half done makes the other ranks time out, and another
        collective in it may never end. On several processes, call it on all of them. On GPUs, a program that XLA has
        recorded in a command buffer is replayed without asking jax_ep, and must not be called any more.
        """
        if self._destroyed:
            return
        self._destroyed = True
        atexit.unregister(self.destroy)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> MoECommunicator:
        return self

    def __exit__(self, *_) -> None:
        self.destroy()

    def _expect_usable(self, op: str) -> None:
        if self._destroyed:
            raise ValueError(f"{op}: expected a live MoECommunicator, got one after destroy()")
        expect_inside_shard_map(self.mesh, self.config.axis_name, op)
        self.check()

    def _expect_requests(self, op: str) -> None:
        expect(self.config.max_requests > 0, "max_requests", f"at least 1 for {op}", self.config.max_requests)

    def _expect_own_handle(self, argument: str, handle) -> None:
        if not isinstance(handle, DispatchHandle):
            raise TypeError(f"{argument}: expected a DispatchHandle, got {type(handle).__name__}")
        mine = self._spec.communicator_id
        expect(handle.communicator_id == mine, argument, "a handle of this communicator", "another communicator's")
        # One of several that a scan stacked has an axis in front.
        expect_array(f"{argument}.num_dropped", handle.num_dropped, (), jnp.int32)
        num_offsets = self._shape.num_row_groups + 1
        expect_array(f"{argument}.layout.offsets", handle.layout.offsets, (num_offsets,), jnp.int32)


def _at_least_one_token(array, fill):
    """A rank without tokens takes part with one that has no expert, so that no op has empty operands."""
    return array if array.shape[0] else jnp.full((1, *array.shape[1:]), fill, array.dtype)


def _varying_axes(tree) -> frozenset[str]:
    return frozenset().union(*(_ffi.varying_axes(leaf) for leaf in jax.tree.leaves(tree)))
