"""`MoE`: an expert-parallel layer that is called like any other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_ep import _ffi
from jax_ep._checks import expect, expect_dtype, expect_floating, expect_int, expect_number
from jax_ep.communicator import MoECommunicator
from jax_ep.eplb import ExpertPlacement, LoadRecorder, count_moves, tie_replicas
from jax_ep.eplb._communicator import EplbCommunicator
from jax_ep.eplb._transfer import transfer_experts
from jax_ep.nn import _rebalance
from jax_ep.nn._matmul import default_grouped_matmul
from jax_ep.nn._router import Router
from jax_ep.types import DispatchLayout, DispatchLayoutInfo


class MoEAux(NamedTuple):
    """What a layer tells of one call, of all tokens on all ranks.

    Attributes:
      balance_loss: float32 `[]`, see `RouterAux`; to be added to the loss, times a small factor.
      z_loss: float32 `[]`, see `RouterAux`; likewise.
      load: float32 `[E]`, each expert's share of all (token, k); what `Router.update_bias` takes.
      num_dropped: int32 `[]`, the (token, k) that found no place within the capacity.
      tokens_per_expert: int32 `[E]`, the (token, k) of each expert, also those that were dropped; what
        `MoE.record_load` takes. None for a layer without `num_slots`.
    """

    balance_loss: jax.Array
    z_loss: jax.Array
    load: jax.Array
    num_dropped: jax.Array
    tokens_per_expert: jax.Array | None = None


class MoE(nnx.Module):
    """A mixture of SwiGLU experts (Shazeer, 2020), spread over a mesh axis. Call it in plain `jit`, on global arrays.

    It maps itself over its mesh by `jax.shard_map`: routing, `dispatch`, the experts and `combine` run per device. The
    experts' kernels carry their partitioning as Flax metadata (`out_sharding`), as `nnx.get_named_sharding` reads it,
    and are created with it: E is split over `expert_axis`, F over `tensor_axis`. All else is replicated.

    Args:
      router: a `Router`, which says H, E and K; or a module like it: called in `jax.shard_map` on a device's tokens
        `[T, H]`, with parameters that are replicated. Calls must not change it.
      intermediate_size: F, of each expert.
      mesh: of all the axes below, outside of which tokens are replicated.
      expert_axis: the mesh axis over which the experts are split, and besides the tokens.
      data_axes: further mesh axes over which tokens are split, slower than `expert_axis`; a name or several. Each
        position on them has all experts.
      tensor_axis: a mesh axis over which F is split; all positions on it have the same tokens, and their partial
        outputs are added up.
      max_tokens_per_rank: the most tokens of a device in one call.
      capacity_factor: rows that a device has room for, over those it gets when all experts are equally busy; what
        exceeds it is dropped and counted. None: room for the worst case, which is the number of ranks times as much.
      implementation: "cuda", "cpu" or "reference"; default by the mesh's platform, "reference" on others than GPUs
        and CPUs.
      communicator: what to send with, instead of one of the layer's own; then `mesh`, `expert_axis`,
        `max_tokens_per_rank`, `capacity_factor` and `implementation` are its. Its layout is `FLAT`. Layers that take
        turns can share one, and so its memory; layers that are created in `nnx.vmap`, `nnx.jit` or `nnx.eval_shape`
        should. With `max_requests` it computes the shared experts while tokens travel.
      num_slots: P, places for experts on all ranks, at least E and as many on each rank. With it the experts' kernels
        are those of slots, `[P, ...]`, experts can have replicas, whose gradients are added up, and `rebalance` moves
        them; E need not be a multiple of the ranks. A communicator then is one of P experts.
      load_window: steps that `rebalance` plans from, with `num_slots`.
      num_shared_experts: experts that every token goes to: one dense SwiGLU of that many F, unweighted.
      grouped_matmul: `(rows [C, X], kernels [L, X, Y], group_sizes int32 [L]) -> [C, Y]` and differentiable, rows
        sorted by local expert; default `default_grouped_matmul`'s. Rows beyond all groups are not read.
      kernel_init: of all kernels but the router's; called with shape `[X, Y]`, for experts with one key each.
      dtype: of tokens, matrix products and result; default the communicator's, or bfloat16.
      param_dtype: of the kernels.
      rngs: draws the kernels, from stream `params`.

    Attributes:
      communicator: a static attribute, compared by identity. `communicator.check()` tells of failed steps, and
        `communicator.destroy()` frees what it holds.
      slots: with `num_slots`, the expert in each, an `ExpertSlots`. At first as if all experts were equally loaded.
      recorded_load: with `num_slots`, what `record_load` was given last, a `RecordedLoad`.
      steps_since_plan: with `num_slots`, what `rebalance` counts with `every`, a `StepsSincePlan`.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """

    def __init__(
        self,
        router: Router,
        intermediate_size: int,
        *,
        mesh: Mesh | None = None,
        expert_axis: str = "ep",
        data_axes: str | tuple[str, ...] = (),
        tensor_axis: str | None = None,
        max_tokens_per_rank: int | None = None,
        capacity_factor: float | None = None,
        implementation: str | None = None,
        communicator: MoECommunicator | None = None,
        num_slots: int | None = None,
        load_window: int = 100,
        num_shared_experts: int = 0,
        grouped_matmul: Callable[..., jax.Array] | None = None,
        kernel_init: Callable = nnx.initializers.lecun_normal(),  # noqa: B008
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name in ("hidden_size", "num_experts", "topk"):
            if not hasattr(router, name):
                raise TypeError(f"router: expected a Router, or a module with its {name}, got {type(router).__name__}")
        intermediate_size = expect_int("intermediate_size", intermediate_size)
        num_shared_experts = expect_int("num_shared_experts", num_shared_experts, minimum=0)
        load_window = expect_int("load_window", load_window)
        if grouped_matmul is not None and not callable(grouped_matmul):
            raise TypeError(f"grouped_matmul: expected a callable, got {type(grouped_matmul).__name__}")
        param_dtype = expect_dtype("param_dtype", param_dtype, _ffi.DTYPES)
        if communicator is None:
            mesh = _checked_mesh(mesh, expert_axis)
        else:
            own = dict(
                mesh=mesh,
                max_tokens_per_rank=max_tokens_per_rank,
                capacity_factor=capacity_factor,
                implementation=implementation,
            )
            _check_communicator(communicator, router, num_slots, dtype, own)
            mesh, expert_axis, dtype = communicator.mesh, communicator.config.axis_name, communicator.config.dtype
        if not isinstance(data_axes, str | tuple | list):
            raise TypeError(f"data_axes: expected the name of an axis or several, got {type(data_axes).__name__}")
        self.data_axes = (data_axes,) if isinstance(data_axes, str) else tuple(data_axes)
        self.expert_axis, self.tensor_axis = expert_axis, tensor_axis
        _check_axes(mesh, expert_axis, self.data_axes, tensor_axis, intermediate_size)
        if num_slots is not None:
            num_slots = _checked_slots(num_slots, router.num_experts, mesh.shape[expert_axis])
        self.dtype = expect_dtype("dtype", jnp.bfloat16 if dtype is None else dtype, _ffi.DTYPES)
        if communicator is None:
            communicator = _make_communicator(
                mesh, expert_axis, router, num_slots, self.dtype, max_tokens_per_rank, capacity_factor, implementation
            )
        self.communicator, self.router = communicator, router
        self.grouped_matmul = grouped_matmul or default_grouped_matmul(communicator.config.implementation)

        hidden, experts, axes = router.hidden_size, router.num_experts, (expert_axis, None, tensor_axis)
        self.num_slots, slots = num_slots, None
        if num_slots is None:
            self.slots = self.recorded_load = self.steps_since_plan = None
        else:
            self._recorder = LoadRecorder(experts, expert_axis, self.data_axes)
            slots = _rebalance.initial_slots(experts, num_slots, mesh.shape[expert_axis])
            self.slots = _rebalance.ExpertSlots(jnp.asarray(slots), out_sharding=(None,), mesh=mesh)
            window = self._recorder.init(load_window)
            self.recorded_load = _rebalance.RecordedLoad(window, out_sharding=(None, None), mesh=mesh)
            none = jnp.zeros((1,), jnp.int32)
            self.steps_since_plan = _rebalance.StepsSincePlan(none, out_sharding=(None,), mesh=mesh)

        def kernels(shape, axes):
            def one(key):
                return kernel_init(key, shape[-2:], param_dtype)

            key = rngs.params()
            value = one(key) if len(shape) == 2 else jax.vmap(one)(jax.random.split(key, shape[0]))
            if len(shape) == 3 and slots is not None:
                value = value[slots]
            return nnx.Param(value, out_sharding=axes, mesh=mesh)

        self.gate = kernels((experts, hidden, intermediate_size), axes)
        self.up = kernels((experts, hidden, intermediate_size), axes)
        self.down = kernels((experts, intermediate_size, hidden), (expert_axis, tensor_axis, None))
        self.num_shared_experts = num_shared_experts
        if num_shared_experts:
            shared = num_shared_experts * intermediate_size
            self.shared_gate = kernels((hidden, shared), axes[1:])
            self.shared_up = kernels((hidden, shared), axes[1:])
            self.shared_down = kernels((shared, hidden), (tensor_axis, None))

    @property
    def placement(self) -> ExpertPlacement | None:
        """Where the experts are, for `jax_ep.eplb.replicate_experts`; None without `num_slots`."""
        return None if self.slots is None else ExpertPlacement.from_slots(self.slots[...], self.router.num_experts)

    def record_load(self, aux: MoEAux) -> None:
        """Puts a step into the window that `rebalance` plans from. In the compiled step, like `Router.update_bias`.

        Raises:
          ValueError: the layer has no `num_slots`.
        """
        _, recorded, _ = self._rebalanced("record_load")
        if not isinstance(aux, MoEAux):
            raise TypeError(f"aux: expected a MoEAux, got {type(aux).__name__}")
        counts: Any = aux.tokens_per_expert
        recorded[...] = self._recorder.push(recorded[...], counts)

    def rebalance(
        self,
        optimizer: nnx.Optimizer | None = None,
        model: nnx.Module | None = None,
        *,
        every: int | None = None,
        slack: float | None = 0.05,
        num_groups: int = 1,
        num_nodes: int = 1,
        communicator: EplbCommunicator | None = None,
        donate: bool = False,
    ) -> int:
        """Places the experts anew for the load that was recorded: their kernels, and what an optimizer keeps for them.

        On the host, between steps, on all processes alike. What the layer computes stays the same, but for the order in
        which gradients are added up, and steps that were compiled take the new placement as they are. Does nothing
        before a load is recorded. A stack of layers, of `nnx.vmap` with `PARTITION_NAME: None`, is rebalanced at once.

        Args:
          optimizer: whose state of this layer's kernels moves with them. Other state by expert, as an average of
            parameters, is for `jax_ep.eplb.transfer_experts`, from `slots[...]` before to those afterwards.
          model: which `optimizer` was made for; default this layer alone.
          every: for a loop that calls this after each step: the calls of which one plans, the others only count. The
            count, `steps_since_plan`, is part of the layer's state, and begins anew with each plan. Nearly all other
            calls return without waiting for the step.
          slack: as for `jax_ep.eplb.replan_experts`; None plans by `rebalance_experts`, wherever the experts are now.
          num_groups, num_nodes: as for both.
          communicator, donate: as for `jax_ep.eplb.transfer_experts`.

        Returns:
          The moves: slots whose expert another rank had to send. 0 from a call that only counts.

        Raises:
          ValueError, TypeError: an argument is unusable, or the layer has no `num_slots`.
          RuntimeError, PeerTimeoutError: as `jax_ep.eplb.transfer_experts`.
        """
        slots, recorded, steps = self._rebalanced("rebalance")
        if optimizer is not None and not isinstance(optimizer, nnx.Optimizer):
            raise TypeError(f"optimizer: expected an nnx.Optimizer, got {type(optimizer).__name__}")
        count = 0 if every is None else _rebalance.count_step(self, steps, expect_int("every", every))
        if count is None:
            return 0
        # Also on the first call of many: errors should not come as late as the first plan.
        variables = self._variables_by_slot(optimizer, self if model is None else model)
        if every is not None and count < every:
            return 0
        steps[...] = _rebalance.placed_like(np.zeros(steps[...].shape), steps[...])
        num_gpus = self.communicator.num_ranks
        cluster = dict(num_groups=num_groups, num_nodes=num_nodes, num_gpus=num_gpus)
        old, load = np.asarray(slots[...]), np.asarray(recorded[...]).sum(-2, dtype=np.int64)
        new = _rebalance.plan_slots(np.atleast_2d(load), np.atleast_2d(old), slack, **cluster).reshape(old.shape)
        if (new == old).all():
            return 0
        arguments = dict(axis_name=self.expert_axis) if communicator is None else {}
        values = [variable[...] for variable in variables]
        values = transfer_experts(values, old, new, communicator, donate=donate, **arguments)
        for variable, value in zip(variables, values, strict=True):
            variable[...] = value
        slots[...] = _rebalance.placed_like(new, slots[...])
        return int(count_moves(np.atleast_2d(old), np.atleast_2d(new), num_gpus).sum())

    def _variables_by_slot(self, optimizer, model) -> list[nnx.Variable]:
        """What moves with the experts."""
        names = ("gate", "up", "down")
        states: list[nnx.Variable] = []
        if optimizer is not None:
            path = _rebalance.path_of(self, model)
            for name in names:
                states += _rebalance.states_of(optimizer, model, (*path, name))
            _rebalance.expect_no_other_state_by_slot(optimizer, self.gate[...].shape[-3])
        return [*(getattr(self, name) for name in names), *states]

    def _rebalanced(self, op: str):
        """The slots, the recorded load, and the steps since the last plan."""
        if self.slots is None:
            raise ValueError(f"num_slots: expected a number of slots for {op}, got None")
        return self.slots, self.recorded_load, self.steps_since_plan

    def __call__(self, x: jax.Array) -> tuple[jax.Array, MoEAux]:
        """Sends each token through its experts, and adds up what they make of it, weighted.

        Args:
          x: `[N, ..., H]`, N over all devices: a multiple of the positions on `data_axes` and `expert_axis`, over which
            it is split. Of any floating dtype; the router sees it as it is, the experts in `dtype`. Differentiable.

        Returns:
          `[N, ..., H]` in `dtype`, split likewise; and what there is to tell of this call.

        Raises:
          ValueError, TypeError: at trace time, naming the argument, what was expected and what came.
          CapacityError, ExpertIdError, PeerTimeoutError: an earlier step failed, see `MoECommunicator.check`.
        """
        mesh, token_axes = self.communicator.mesh, (*self.data_axes, self.expert_axis)
        self._check_tokens(x, math.prod(mesh.shape[axis] for axis in token_axes))
        router_graph, router_state = nnx.split(self.router)
        expert, tensor = self.expert_axis, self.tensor_axis
        experts = self.gate[...], self.up[...], self.down[...]
        experts_specs = P(expert, None, tensor), P(expert, None, tensor), P(expert, tensor, None)
        shared, shared_specs = None, None
        if self.num_shared_experts:
            shared = self.shared_gate[...], self.shared_up[...], self.shared_down[...]
            shared_specs = P(None, tensor), P(None, tensor), P(tensor, None)

        def on_each_device(x, router_state, experts, shared, placement):
            # In here, since outside XLA would gather all tokens' scores to choose from them.
            tokens = x.reshape(-1, x.shape[-1])
            topk_ids, weights, aux = _routed(nnx.merge(router_graph, router_state), tokens)
            aux = jax.lax.pmean(aux, token_axes)
            counts = None if placement is None else self._recorder.count(topk_ids)
            y, num_dropped = self._outputs(tokens.astype(self.dtype), topk_ids, weights, experts, shared, placement)
            num_dropped = jax.lax.psum(num_dropped, token_axes)
            return y.reshape(x.shape), MoEAux(aux.balance_loss, aux.z_loss, aux.load, num_dropped, counts)

        return jax.shard_map(
            on_each_device,
            mesh=mesh,
            in_specs=(P(token_axes), P(), experts_specs, shared_specs, P()),
            out_specs=(P(token_axes), P()),
        )(x, router_state, experts, shared, self.placement)

    def _check_tokens(self, x, num_ranks: int) -> None:
        expect_floating("x", x)
        hidden = self.router.hidden_size
        fits = x.ndim >= 2 and x.shape[-1] == hidden
        expect(fits, "x", f"shape [N, ..., {hidden}]", f"shape {list(x.shape)}")
        expect(x.shape[0] % num_ranks == 0, "x", f"a multiple of the {num_ranks} ranks in front", x.shape[0])

    def _outputs(self, tokens, topk_ids, weights, experts, shared, placement) -> tuple[jax.Array, jax.Array]:
        """A device's [T, H], and how many (token, k) it dropped."""
        comm, tensor = self.communicator, self.tensor_axis
        if tensor is not None:
            # So that gradients are added up over the axis per token, rather than per row that was received.
            tokens, topk_ids, weights = (_ffi.vary(array, {tensor}) for array in (tokens, topk_ids, weights))
        if placement is not None:
            experts = tie_replicas(experts, placement, self.expert_axis)
        is_overlapped = shared is not None and comm.config.max_requests > 0
        sent = tokens, topk_ids, weights
        request = comm.dispatch_async(*sent, placement=placement) if is_overlapped else None
        dense = None if shared is None else swiglu(tokens, *shared, matmul=jnp.matmul)
        out, handle = comm.dispatch(*sent, placement=placement) if request is None else request.wait()
        sizes = group_sizes(out.layout)
        y = swiglu(out.tokens, *experts, matmul=lambda rows, kernels: self.grouped_matmul(rows, kernels, sizes))
        y = comm.combine(y, handle)
        y = y if dense is None else y + dense
        num_dropped = out.num_dropped
        if tensor is not None:
            wide = y.dtype if y.dtype.itemsize >= 4 else jnp.float32
            y = jax.lax.psum(y.astype(wide), tensor).astype(y.dtype)
            num_dropped = jax.lax.pmax(jax.lax.stop_gradient(num_dropped), tensor)  # the same everywhere
        return y, num_dropped


def _routed(router, tokens):
    """What a router says of tokens. A copy of it: what it would keep of the call is lost."""
    before = jax.tree.leaves(nnx.state(router))
    routed = router(tokens)
    after = jax.tree.leaves(nnx.state(router))
    is_same = len(after) == len(before) and all(new is old for new, old in zip(after, before, strict=True))
    expect(is_same, "router", "a module that its calls do not change", "one that keeps state, as nnx.Rngs do")
    return routed


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, *, matmul) -> jax.Array:
    """`x` [C, H] -> [C, H], in its dtype."""
    gate, up, down = (kernel.astype(x.dtype) for kernel in (gate, up, down))
    return matmul(jax.nn.silu(matmul(x, gate)) * matmul(x, up), down)


def group_sizes(layout: DispatchLayoutInfo) -> jax.Array:
    """int32 [L], rows of each local expert, those between aligned groups included."""
    return layout.offsets[1:] - layout.offsets[:-1]


def _checked_mesh(mesh, expert_axis: str) -> Mesh:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, or a communicator, got {type(mesh).__name__}")
    expect(expert_axis in mesh.axis_names, "expert_axis", f"one of {mesh.axis_names}", repr(expert_axis))
    return mesh


def _check_axes(mesh: Mesh, expert_axis, data_axes, tensor_axis, intermediate_size: int) -> None:
    for axis in data_axes:
        expect(axis in mesh.axis_names, "data_axes", f"names of {mesh.axis_names}", repr(axis))
    used = (*data_axes, expert_axis)
    expect(len(set(used)) == len(used), "data_axes", f"distinct axes besides {expert_axis!r}", data_axes)
    if tensor_axis is not None:
        others = tuple(axis for axis in mesh.axis_names if axis not in used)
        expect(tensor_axis in others, "tensor_axis", f"one of the mesh's other axes {others}", repr(tensor_axis))
        size = mesh.shape[tensor_axis]
        multiple = f"a multiple of the {size} positions on {tensor_axis!r}"
        expect(intermediate_size % size == 0, "intermediate_size", multiple, intermediate_size)


def _checked_slots(num_slots, num_experts: int, num_ranks: int) -> int:
    num_slots = expect_int("num_slots", num_slots)
    expect(num_slots >= num_experts, "num_slots", f"at least the {num_experts} experts", num_slots)
    expect(num_slots % num_ranks == 0, "num_slots", f"a multiple of the {num_ranks} ranks", num_slots)
    return num_slots


def _check_communicator(communicator, router: Router, num_slots: int | None, dtype, own: dict) -> None:
    if not isinstance(communicator, MoECommunicator):
        raise TypeError(f"communicator: expected a MoECommunicator, got {type(communicator).__name__}")
    for name, value in own.items():
        expect(value is None, name, "None beside communicator", value)
    config = communicator.config
    names = ("hidden_size", "topk") if num_slots is not None else ("hidden_size", "num_experts", "topk")
    for name in names:
        wanted = getattr(router, name)
        expect(getattr(config, name) == wanted, "communicator", f"{name}={wanted} of the router", getattr(config, name))
    if num_slots is not None:
        wanted = f"num_experts={num_slots}, the num_slots"
        expect(config.num_experts == num_slots, "communicator", wanted, config.num_experts)
    expect(config.output_layout is DispatchLayout.FLAT, "communicator", "output_layout FLAT", config.output_layout)
    if dtype is not None:
        mine, theirs = expect_dtype("dtype", dtype, _ffi.DTYPES).name, config.dtype.name
        expect(mine == theirs, "dtype", f"{theirs}, the communicator's", mine)


def _make_communicator(
    mesh: Mesh, axis_name: str, router: Router, num_slots, dtype, max_tokens_per_rank, capacity_factor, implementation
) -> MoECommunicator:
    max_tokens_per_rank = expect_int("max_tokens_per_rank", max_tokens_per_rank)
    capacity = None
    if capacity_factor is not None:
        capacity_factor = expect_number("capacity_factor", capacity_factor)
        expect(0 < capacity_factor < math.inf, "capacity_factor", "a positive number", capacity_factor)
        # More than all tokens of all ranks cannot come.
        factor = min(capacity_factor, mesh.shape[axis_name])
        capacity = math.ceil(factor * max_tokens_per_rank * router.topk)
    return MoECommunicator(
        mesh,
        axis_name=axis_name,
        num_experts=router.num_experts if num_slots is None else num_slots,
        hidden_size=router.hidden_size,
        topk=router.topk,
        max_tokens_per_rank=max_tokens_per_rank,
        max_recv_tokens_per_rank=capacity,
        overflow="error" if capacity is None else "drop",
        dtype=dtype,
        implementation=implementation,
    )
