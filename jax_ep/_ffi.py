"""The native ops: loads the extensions, registers their targets, and calls them with correctly typed outputs.

Nothing above this file knows which backend runs an op: one target name is registered for each platform.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import compute_on
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep._checks import expect
from jax_ep.types import DispatchLayout, MoEMode

# Values are part of the contract with ffi/common/layout.h.
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
LAYOUTS = {DispatchLayout.FLAT: 0, DispatchLayout.RANK_MAJOR: 1, DispatchLayout.EXPERT_MAJOR: 2}
_QUANT_DTYPES = {"float8_e4m3fn": 0, "float8_e5m2": 1, "int8": 2}
_SCALE_DTYPES = {"float32": 0, "float8_e8m0fnu": 1}

_EXTENSIONS = {"cpu": ("jax_ep._cpu", "cpu"), "cuda": ("jax_ep._cuda", "CUDA")}


@functools.cache
def extension(implementation: str) -> ModuleType:
    """Loads the extension of "cpu" or "cuda" and registers its ops.

    To be called once devices exist: jax 0.10.2 registers types that come before its backends too late.
    """
    module_name, platform = _EXTENSIONS[implementation]
    if implementation == "cuda":
        # A kernel that is first loaded while a peer's kernel waits for it would wait for that peer.
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise NotImplementedError(
            f"implementation={implementation!r}: this installation of jax_ep has no {module_name} extension "
            f"({error}). Install with JAX_EP_CUDA=on where a CUDA 13 compiler is found, or choose "
            'implementation="reference".'
        ) from error
    for name, type_info in module.types().items():
        jax.ffi.register_ffi_type(name, type_info, platform=platform)
    for name, handlers in module.registrations().items():
        jax.ffi.register_ffi_target(name, handlers, platform=platform)
    return module


def varying_axes(x) -> frozenset[str]:
    """The mesh axes that `x` is typed as varying over; none where shard_map does not check."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x, axes):
    """`x` typed as varying over `axes` as well."""
    missing = tuple(sorted(set(axes) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _result(shape, dtype, like) -> jax.ShapeDtypeStruct:
    """An output that varies over the same mesh axes as `like`; a bare struct would be typed replicated."""
    aval = jax.typeof(like)
    return jax.ShapeDtypeStruct(
        shape,
        dtype,
        sharding=NamedSharding(aval.sharding.mesh, PartitionSpec()),
        manual_axis_type=aval.manual_axis_type,
    )


def _absent(like, dtype=jnp.float32) -> jax.Array:
    """The scalar operand that stands for None.

    Not an empty array: differentiation may carry it out of the `shard_map`, where one crashes jaxlib 0.11.2's compiler.
    """
    return vary(jnp.zeros((), dtype), varying_axes(like))


def _given(operand, like, dtype=jnp.float32) -> jax.Array:
    return _absent(like, dtype) if operand is None else operand


# An identity that checks, when a program is lowered, which devices that is for: tracing knows only names and sizes of
# mesh axes. Ranks of another order would find each other's memory.
_on_devices_p = Primitive("jax_ep_on_devices")
_on_devices_p.def_impl(lambda x, *, op, devices: x)
_on_devices_p.def_abstract_eval(lambda x, *, op, devices: x)
batching.defvectorized(_on_devices_p)


def _lower_on_devices(context, x, *, op: str, devices: tuple[int, ...]):
    mesh = getattr(context.module_context.axis_context, "mesh", None)
    if isinstance(mesh, jax.sharding.Mesh):  # an AbstractMesh has no devices
        got = tuple(device.id for device in mesh.devices.flat)
        expect(got == devices, op, f"shard_map over the communicator's devices {devices}", got)
    return [x]


mlir.register_lowering(_on_devices_p, _lower_on_devices)


def _call(name: str, spec, results, first, *operands, **attributes: int):
    numbers = {key: np.int64(value) for key, value in attributes.items()}
    devices = tuple(device.id for device in spec.communicator.mesh.devices.flat)
    first = _on_devices_p.bind(first, op=name, devices=devices)
    return jax.ffi.ffi_call(name, results)(first, *operands, comm=np.int64(spec.communicator_id), **numbers)


def dispatch(spec, x, weights, topk_ids, quant=None, *, fill: bool = True, ticket=None):
    """`x` [T, H], `weights` [T, K] or None, `topk_ids` [T, K] -> (tables [N], num_tokens_per_expert [L],
    offsets [G + 1], num_dropped [], recv_topk_ids [C, K] or None), and as `dispatch_cached`.

    With the `ticket` [2] of `dispatch_start` this is the receiving half of what that sent, given the same.
    """
    shape = spec.shape
    recv_rows = shape.capacity if shape.layout is DispatchLayout.RANK_MAJOR else 0
    sizes = [
        (spec.route_tables_size(topk_ids.shape[0]),),
        (shape.num_local_experts,),
        (shape.num_row_groups + 1,),
        (),
        (recv_rows, shape.topk),
    ]
    *routed, recv_topk_ids, tokens, row_weights, row_scales = _call(
        "jax_ep_dispatch",
        spec,
        [*(_result(size, jnp.int32, topk_ids) for size in sizes), *_row_results(spec, x, weights, quant)],
        topk_ids,
        x,
        _given(weights, x),
        _scales(x, quant),
        _given(ticket, x, jnp.int32),
        fill=fill,
    )
    routed = (*routed, recv_topk_ids if recv_topk_ids.size else None)
    return routed, _received(tokens, row_weights, row_scales)


def dispatch_cached(spec, x, weights, tables, quant=None, *, fill: bool = True, ticket=None):
    """`x` [T, H], `weights` [T, K] or None -> rows [C, H], their weights ([C], [C, K], or None), and with a
    `QuantConfig` their scales [C, H / block], else None.

    Without `fill`, slots of EXPERT_MAJOR without a token hold anything. A `ticket` is as in `dispatch`.
    """
    received = _call(
        "jax_ep_dispatch_cached",
        spec,
        _row_results(spec, x, weights, quant),
        x,
        _given(weights, x),
        _scales(x, quant),
        tables,
        _absent(x),
        _absent(x),
        _given(ticket, x, jnp.int32),
        fill=fill,
    )
    return _received(*received)


def _scales(x, quant):
    return _absent(x) if quant is None or quant.scales is None else quant.scales


def _received(tokens, row_weights, row_scales):
    return tokens, row_weights if row_weights.size else None, row_scales if row_scales.size else None


def _row_results(spec, x, weights, quant):
    shape = spec.shape
    per_row = (shape.topk,) if shape.layout is DispatchLayout.RANK_MAJOR else ()
    scalars = (0,) if weights is None else (shape.capacity, *per_row)
    rows = shape.capacity, shape.hidden_size
    return [
        _result(rows, x.dtype if quant is None else quant.dtype, x),
        _result(scalars, jnp.float32, x),
        _result((0,), jnp.float32, x)
        if quant is None
        else _result((shape.capacity, shape.hidden_size // quant.block_size), quant.scale_dtype, x),
    ]


def dispatch_scaled(spec, g, tables, y, row_weights):
    """The gradient of a weighted combine: `g` [T, H], `y` [C, H], `row_weights` [C] -> each row's weight times
    its token's g [C, H], and the dot product of that g with the row's y [C]."""
    shape = spec.shape
    sizes = (shape.capacity, shape.hidden_size), (shape.capacity,), (0,)
    rows, dots, _ = _call(
        "jax_ep_dispatch_cached",
        spec,
        [_result(size, dtype, g) for size, dtype in zip(sizes, (g.dtype, jnp.float32, jnp.float32), strict=True)],
        g,
        _absent(g),
        _absent(g),
        tables,
        y,
        row_weights,
        _absent(g, jnp.int32),
        fill=True,
    )
    return rows, dots


def combine(spec, y, row_weights, row_scalars, tables, num_tokens, ticket=None):
    """`y` [C, H] -> sums [T, H], and `row_scalars` brought back to their (token, k) [T, K], or None.

    With the `ticket` [2] of `combine_start` this is the receiving half of what that sent, given the same.
    """
    shape = spec.shape
    scalars = (0,) if row_scalars is None else (num_tokens, shape.topk)
    out, token_scalars = _call(
        "jax_ep_combine",
        spec,
        [_result((num_tokens, shape.hidden_size), y.dtype, y), _result(scalars, jnp.float32, y)],
        y,
        _given(row_weights, y),
        _given(row_scalars, y),
        tables,
        _given(ticket, y, jnp.int32),
    )
    return out, None if row_scalars is None else token_scalars


def transfer(spec, source, tables, num_slots: int) -> jax.Array:
    """`source` [S, W], packed `tables` [n] -> [D, W]; see `_transfer.TransferTables`."""
    return _call("jax_ep_transfer", spec, _result((num_slots, source.shape[1]), source.dtype, source), source, tables)


def dispatch_start(spec, x, weights, topk_ids, tables, quant=None) -> jax.Array:
    """Sends what `dispatch`, or without `topk_ids` `dispatch_cached`, is to receive -> its ticket [2].

    On CPUs the receiving half does all of it.
    """
    block, dtype, scale_dtype = 0, 0, 0
    if quant is not None:
        block = quant.block_size
        dtype, scale_dtype = _QUANT_DTYPES[quant.dtype.name], _SCALE_DTYPES[quant.scale_dtype.name]
    return _start(
        "jax_ep_dispatch_start",
        spec,
        x,
        (_given(topk_ids, x, jnp.int32), x, _given(weights, x), _scales(x, quant), _given(tables, x, jnp.int32)),
        block=block,
        quant_dtype=dtype,
        scale_dtype=scale_dtype,
    )


def combine_start(spec, y, row_weights, tables, num_tokens) -> jax.Array:
    """Sends what `combine` is to receive -> its ticket [2]. On CPUs the receiving half does all of it."""
    operands = y, _given(row_weights, y), tables
    return _start("jax_ep_combine_start", spec, y, operands, num_tokens=num_tokens)


def _start(name: str, spec, like, operands, **attributes: int) -> jax.Array:
    """A sending half, which is not differentiated: the receiving half takes the same operands, and is."""
    ticket = _result((2,), jnp.int32, like)

    def send(*operands):
        return _call(name, spec, ticket, *operands, **attributes)

    return _beside_compute(spec, send)(*jax.lax.stop_gradient(operands))


def _beside_compute(spec, send: Callable) -> Callable:
    """`send`, beside XLA's compute stream where there is one and this jax can say so.

    Not in mode LOW_LATENCY, where streams that wait for each other cost more than they hide.
    """
    config = spec.communicator.config
    overlaps = config.implementation == "cuda" and config.mode is MoEMode.HIGH_THROUGHPUT
    return on_collective_stream(send) if overlaps and _COMPUTE_ON_TRANSFORMS else send


# A function that transforms since jax 0.11.1, a context manager before.
_COMPUTE_ON_TRANSFORMS = "out_memory_spaces" in inspect.signature(compute_on.compute_on).parameters


def on_collective_stream(fn: Callable) -> Callable:
    """`fn`, which XLA for GPUs then runs beside its compute stream.

    Its result is one array: when XLA takes a second result of what runs on another stream, it waits for the first.
    """
    transform: Callable = compute_on.compute_on if _COMPUTE_ON_TRANSFORMS else compute_on.compute_on2
    return transform(fn, compute_type="gpu_stream:collective", out_memory_spaces=jax.memory.Space.Device)
