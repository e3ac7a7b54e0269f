"""`MoE`: an expert-parallel layer that is called like any other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_ep import _ffi
from jax_ep._checks import expect, expect_dtype, expect_int
from jax_ep.communicator import MoECommunicator
from jax_ep.nn._router import Router
from jax_ep.types import DispatchLayout, DispatchLayoutInfo


class MoEAux(NamedTuple):
    """What a layer tells of one call, of all tokens on all ranks.

    Attributes:
      balance_loss: float32 `[]`, see `RouterAux`; to be added to the loss, times a small factor.
      z_loss: float32 `[]`, see `RouterAux`; likewise.
      load: float32 `[E]`, each expert's share of all (token, k); what `Router.update_bias` takes.
      num_dropped: int32 `[]`, the (token, k) that found no place within the capacity.
    """

    balance_loss: jax.Array
    z_loss: jax.Array
    load: jax.Array
    num_dropped: jax.Array


class MoE(nnx.Module):
    """A mixture of SwiGLU experts (Shazeer, 2020), spread over a mesh axis. Call it in plain `jit`, on global arrays.

    It maps itself over its mesh by `jax.shard_map`: routing, `dispatch`, the experts and `combine` run per device. The
    experts' kernels carry their partitioning as Flax metadata (`out_sharding`), as `nnx.get_named_sharding` reads it,
    and are created with it: E is split over `expert_axis`, F over `tensor_axis`. All else is replicated.

    Args:
      router: a `Router`, which says H, E and K; or a module like it: called in `jax.shard_map` on a device's tokens
        `[T, H]`, with parameters that are replicated.
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
      num_shared_experts: experts that every token goes to: one dense SwiGLU of that many F, unweighted.
      grouped_matmul: `(rows [C, X], kernels [L, X, Y], group_sizes int32 [L]) -> [C, Y]` and differentiable, rows
        sorted by local expert; default `jax.lax.ragged_dot`. Rows beyond all groups are not read.
      kernel_init: of all kernels but the router's; called with shape `[X, Y]`, for experts with one key each.
      dtype: of tokens, matrix products and result; default the communicator's, or bfloat16.
      param_dtype: of the kernels.
      rngs: draws the kernels, from stream `params`.

    Attributes:
      communicator: a static attribute, compared by identity. `communicator.check()` tells of failed steps, and
        `communicator.destroy()` frees what it holds.

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
        num_shared_experts: int = 0,
        grouped_matmul: Callable[..., jax.Array] = jax.lax.ragged_dot,
        kernel_init: Callable = nnx.initializers.lecun_normal(),  # noqa: B008
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name in ("hidden_size", "num_experts", "topk"):
            if not hasattr(router, name):
                raise TypeError(f"router: expected a Router, or a module with its {name}, got {type(router).__name__}")
        expect_int("intermediate_size", intermediate_size)
        expect_int("num_shared_experts", num_shared_experts, minimum=0)
        if not callable(grouped_matmul):
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
            _check_communicator(communicator, router, dtype, own)
            mesh, expert_axis, dtype = communicator.mesh, communicator.config.axis_name, communicator.config.dtype
        self.data_axes = (data_axes,) if isinstance(data_axes, str) else tuple(data_axes)
        self.expert_axis, self.tensor_axis = expert_axis, tensor_axis
        _check_axes(mesh, expert_axis, self.data_axes, tensor_axis, intermediate_size)
        self.dtype = expect_dtype("dtype", jnp.bfloat16 if dtype is None else dtype, _ffi.DTYPES)
        if communicator is None:
            communicator = _make_communicator(
                mesh, expert_axis, router, self.dtype, max_tokens_per_rank, capacity_factor, implementation
            )
        self.communicator, self.router, self.grouped_matmul = communicator, router, grouped_matmul

        hidden, experts, axes = router.hidden_size, router.num_experts, (expert_axis, None, tensor_axis)

        def kernels(shape, axes):
            def one(key):
                return kernel_init(key, shape[-2:], param_dtype)

            key = rngs.params()
            value = one(key) if len(shape) == 2 else jax.vmap(one)(jax.random.split(key, shape[0]))
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

        def on_each_device(x, router_state, experts, shared):
            # In here, since outside XLA would gather all tokens' scores to choose from them.
            tokens = x.reshape(-1, x.shape[-1])
            topk_ids, weights, aux = nnx.merge(router_graph, router_state)(tokens)
            aux = jax.lax.pmean(aux, token_axes)
            y, num_dropped = self._outputs(tokens.astype(self.dtype), topk_ids, weights, experts, shared)
            num_dropped = jax.lax.psum(num_dropped, token_axes)
            return y.reshape(x.shape), MoEAux(aux.balance_loss, aux.z_loss, aux.load, num_dropped)

        return jax.shard_map(
            on_each_device,
            mesh=mesh,
            in_specs=(P(token_axes), P(), experts_specs, shared_specs),
            out_specs=(P(token_axes), P()),
        )(x, router_state, experts, shared)

    def _check_tokens(self, x, num_ranks: int) -> None:
        hidden = self.router.hidden_size
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"x: expected an array, got {type(x).__name__}")
        fits = x.ndim >= 2 and x.shape[-1] == hidden
        expect(fits, "x", f"shape [N, ..., {hidden}]", f"shape {list(x.shape)}")
        expect(x.shape[0] % num_ranks == 0, "x", f"a multiple of the {num_ranks} ranks in front", x.shape[0])
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x: expected a floating dtype, got {x.dtype}")

    def _outputs(self, tokens, topk_ids, weights, experts, shared) -> tuple[jax.Array, jax.Array]:
        """A device's [T, H], and how many (token, k) it dropped."""
        comm, tensor = self.communicator, self.tensor_axis
        if tensor is not None:
            # So that gradients are added up over the axis per token, rather than per row that was received.
            tokens, topk_ids, weights = (_ffi.vary(array, {tensor}) for array in (tokens, topk_ids, weights))
        is_overlapped = shared is not None and comm.config.max_requests > 0
        request = comm.dispatch_async(tokens, topk_ids, weights) if is_overlapped else None
        dense = None if shared is None else swiglu(tokens, *shared, matmul=jnp.matmul)
        out, handle = comm.dispatch(tokens, topk_ids, weights) if request is None else request.wait()
        sizes = group_sizes(out.layout)
        y = swiglu(out.tokens, *experts, matmul=lambda rows, kernels: self.grouped_matmul(rows, kernels, sizes))
        y = comm.combine(y, handle)
        y = y if dense is None else y + dense
        num_dropped = out.num_dropped
        if tensor is not None:
            wide = jnp.promote_types(y.dtype, jnp.float32)
            y = jax.lax.psum(y.astype(wide), tensor).astype(y.dtype)
            num_dropped = jax.lax.pmax(jax.lax.stop_gradient(num_dropped), tensor)  # the same everywhere
        return y, num_dropped


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


def _check_communicator(communicator, router: Router, dtype, own: dict) -> None:
    if not isinstance(communicator, MoECommunicator):
        raise TypeError(f"communicator: expected a MoECommunicator, got {type(communicator).__name__}")
    for name, value in own.items():
        expect(value is None, name, "None beside communicator", value)
    config = communicator.config
    for name in ("hidden_size", "num_experts", "topk"):
        wanted = getattr(router, name)
        expect(getattr(config, name) == wanted, "communicator", f"{name}={wanted} of the router", getattr(config, name))
    expect(config.output_layout is DispatchLayout.FLAT, "communicator", "output_layout FLAT", config.output_layout)
    if dtype is not None:
        theirs = jnp.dtype(config.dtype).name
        expect(jnp.dtype(dtype).name == theirs, "dtype", f"{theirs}, the communicator's", jnp.dtype(dtype).name)


def _make_communicator(
    mesh: Mesh, axis_name: str, router: Router, dtype, max_tokens_per_rank, capacity_factor, implementation
) -> MoECommunicator:
    expect_int("max_tokens_per_rank", max_tokens_per_rank)
    capacity = None
    if capacity_factor is not None:
        expect(capacity_factor > 0, "capacity_factor", "a positive number", capacity_factor)
        # More than all tokens of all ranks cannot come.
        factor = min(capacity_factor, mesh.shape[axis_name])
        capacity = math.ceil(factor * max_tokens_per_rank * router.topk)
    return MoECommunicator(
        mesh,
        axis_name=axis_name,
        num_experts=router.num_experts,
        hidden_size=router.hidden_size,
        topk=router.topk,
        max_tokens_per_rank=max_tokens_per_rank,
        max_recv_tokens_per_rank=capacity,
        overflow="error" if capacity is None else "drop",
        dtype=dtype,
        implementation=implementation,
    )
