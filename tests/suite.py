"""The checks that every backend has to pass, in one process or in several.

Each check draws all its data from one seed, runs an implementation and the reference on the same mesh, and compares
what this process holds of both. The layer under test is linear in each argument, so that `dense` can state the
result and all gradients in numpy, and how large their terms are: that is what rounding errors are measured by.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import DispatchLayout, MoEMode, QuantConfig, _quant

FLAT, RANK_MAJOR, EXPERT_MAJOR = DispatchLayout.FLAT, DispatchLayout.RANK_MAJOR, DispatchLayout.EXPERT_MAJOR
HIGH_THROUGHPUT, LOW_LATENCY = MoEMode.HIGH_THROUGHPUT, MoEMode.LOW_LATENCY

# Each mode with each of its layouts. Those of the first mode in the second make a difference to kernels on GPUs alone.
ARRANGEMENTS = (
    (LOW_LATENCY, FLAT),
    (LOW_LATENCY, RANK_MAJOR),
    (HIGH_THROUGHPUT, FLAT),
    (HIGH_THROUGHPUT, RANK_MAJOR),
    (LOW_LATENCY, EXPERT_MAJOR),
)


def arrangement_id(value) -> str:
    return {HIGH_THROUGHPUT: "ht", LOW_LATENCY: "ll"}.get(value) or value.value


# Each element type with each type of scales. Rows of a multiple of 128 elements suit all.
QUANTS = tuple(
    QuantConfig(dtype=dtype, block_size=block_size, scale_dtype=scale_dtype)
    for dtype, float_block in (("float8_e4m3fn", 128), ("float8_e5m2", 32), ("int8", 64))
    for scale_dtype, block_size in (("float32", float_block), ("float8_e8m0fnu", 32))
)

# Both sides round each term, each rank's sum and the total, to the dtype.
ROUNDINGS = 8
FLUSHED = float(jnp.finfo(jnp.float32).smallest_normal)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's sizes and options; `num_ranks` is that of the mesh's ep axis."""

    num_ranks: int
    num_tokens: int = 9
    hidden_size: int = 16
    topk: int = 2
    num_experts: int = 24
    dtype: str = "float32"
    layout: DispatchLayout = FLAT
    mode: MoEMode = HIGH_THROUGHPUT
    routing: str = "uniform"
    weighted: bool = True
    expert_alignment: int = 1
    max_tokens_per_rank: int | None = None
    capacity: int | None = None
    overflow: str = "error"
    check_vma: bool = True
    quant: QuantConfig | None = None
    came_quantised: bool = False  # x is quantised before dispatch
    max_requests: int = 0  # with any, the layer dispatches and combines in halves
    seed: int = 0


class Inputs(NamedTuple):
    x: jax.Array  # [N, H], N tokens over all ranks
    weights: jax.Array  # [N, K]
    scale: jax.Array  # [E, H], the experts' parameters
    gain: jax.Array  # [H], a parameter that all ranks share
    row_bias: jax.Array  # [rows of all ranks, H], zeros: its gradient is that of the expert output
    topk_ids: jax.Array  # [N, K]
    gradient: jax.Array  # [N, H], of the combined output


class Result(NamedTuple):
    received: jax_ep.DispatchOutput
    out: jax.Array
    gradients: tuple[jax.Array, ...]  # of x, weights, scale, gain, row_bias


# Devices and data.


def missing(implementation: str) -> str:
    """What `implementation` lacks on this machine, or nothing."""
    if implementation != "cuda":
        return ""
    if not any(device.platform == "gpu" for device in jax.devices()):
        return "no GPU"
    return "" if importlib.util.find_spec("jax_ep._cuda") else "jax_ep was built without CUDA"


def devices_of(implementation: str) -> list[jax.Device]:
    return jax.devices("gpu" if implementation == "cuda" else "cpu")


def num_ranks_at_most(implementation: str, num_ranks: int) -> int:
    """The largest power of two up to `num_ranks` that the devices at hand allow."""
    while num_ranks > len(devices_of(implementation)):
        num_ranks //= 2
    return num_ranks


def make_mesh(implementation: str, num_ranks: int, dp: int = 1, ep_first=False, axis_type=AxisType.Explicit):
    """A mesh ("ep",), or with dp > 1 ("dp", "ep") or ("ep", "dp")."""
    devices = devices_of(implementation)
    if len(devices) < num_ranks * dp:
        pytest.skip(f"needs {num_ranks * dp} {implementation} devices, there are {len(devices)}")
    shape, names = (num_ranks,), ("ep",)
    if dp > 1:
        shape, names = ((num_ranks, dp), ("ep", "dp")) if ep_first else ((dp, num_ranks), ("dp", "ep"))
    grid = np.array(devices[: num_ranks * dp]).reshape(shape)
    return Mesh(grid, names, axis_types=(axis_type,) * len(names))


def wide_dtype(dtype) -> np.dtype:
    """What sums of `dtype` are kept in."""
    return np.promote_types(jnp.dtype(dtype), np.float32) if jnp.dtype(dtype).kind == "f" else np.dtype(np.float32)


def draw_topk_ids(rng: np.random.Generator, case: Case, num_tokens: int) -> np.ndarray:
    shape, num_experts = (num_tokens, case.topk), case.num_experts
    match case.routing:
        case "uniform":
            topk_ids = rng.integers(0, num_experts, shape)
            topk_ids[rng.random(shape) < 0.125] = -1
        case "skewed":
            topk_ids = (rng.zipf(1.3, shape) - 1) % num_experts
        case "single":
            topk_ids = np.full(shape, rng.integers(0, num_experts))
        case "empty":
            topk_ids = np.full(shape, -1)
    if case.layout is EXPERT_MAJOR and case.overflow == "error":
        # An expert has slots enough for tokens that name it once.
        earlier = (topk_ids[:, :, None] == topk_ids[:, None, :]) & np.tri(case.topk, k=-1, dtype=bool)
        topk_ids = np.where(earlier.any(2), -1, topk_ids)
    return topk_ids.astype(np.int32)


def draw(case: Case, dp: int = 1) -> Inputs:
    """Numpy arrays over all ranks and all dp groups; `row_bias` is left to `place`, which knows the capacity."""
    rng = np.random.default_rng(case.seed)
    dtype = np.dtype(jnp.dtype(case.dtype))
    num_tokens = dp * case.num_ranks * case.num_tokens
    parameter_dtype = wide_dtype(case.dtype)
    return Inputs(
        x=rng.standard_normal((num_tokens, case.hidden_size)).astype(dtype),
        weights=rng.random((num_tokens, case.topk), np.float32),
        scale=rng.standard_normal((case.num_experts, case.hidden_size)).astype(parameter_dtype),
        gain=rng.standard_normal(case.hidden_size).astype(parameter_dtype),
        row_bias=np.zeros((), dtype),
        topk_ids=draw_topk_ids(rng, case, num_tokens),
        gradient=rng.standard_normal((num_tokens, case.hidden_size)).astype(dtype),
    )


def put(array: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """A global array of which each process makes its own part."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def place(inputs: Inputs, mesh: Mesh, capacity: int) -> Inputs:
    hidden_size = inputs.x.shape[1]
    row_bias = np.zeros((mesh.size * capacity, hidden_size), inputs.x.dtype)
    arrays = zip(inputs._replace(row_bias=row_bias), input_specs(mesh), strict=True)
    return Inputs(*(put(array, mesh, spec) for array, spec in arrays))


def input_specs(mesh: Mesh) -> Inputs:
    tokens = P(mesh.axis_names)
    return Inputs(tokens, tokens, P("ep"), P(), tokens, tokens, tokens)


# The layer under test.


def communicator(implementation: str, mesh: Mesh, case: Case, **arguments) -> jax_ep.MoECommunicator:
    return jax_ep.MoECommunicator(
        mesh,
        **dict(
            num_experts=case.num_experts,
            hidden_size=case.hidden_size,
            topk=case.topk,
            max_tokens_per_rank=case.max_tokens_per_rank or max(1, case.num_tokens),
            max_recv_tokens_per_rank=case.capacity,
            overflow=case.overflow,
            output_layout=case.layout,
            mode=case.mode,
            expert_alignment=case.expert_alignment,
            dtype=jnp.dtype(case.dtype),
            max_requests=case.max_requests,
            implementation=implementation,
        )
        | arguments,
    )


def expert_of_rows(layout: jax_ep.DispatchLayoutInfo, capacity: int) -> tuple[jax.Array, jax.Array]:
    """For FLAT: each row's local expert, and whether the row holds a token."""
    rows = jnp.arange(capacity, dtype=jnp.int32)
    experts = (rows[:, None] >= layout.offsets[1:-1]).sum(1, dtype=jnp.int32)
    return experts, rows - layout.offsets[experts] < layout.num_tokens_per_expert[experts]


def holds_token(out: jax_ep.DispatchOutput) -> jax.Array:
    """Which rows do, `[C]` or `[L, S]`."""
    match out.layout.kind:
        case DispatchLayout.FLAT:
            return expert_of_rows(out.layout, out.tokens.shape[0])[1]
        case DispatchLayout.RANK_MAJOR:
            return (out.topk_ids >= 0).any(1)
        case DispatchLayout.EXPERT_MAJOR:
            slots = jnp.arange(out.tokens.shape[1], dtype=jnp.int32)
            return slots < out.layout.num_tokens_per_expert[:, None]


def apply_experts(out: jax_ep.DispatchOutput, factors: jax.Array, dtype=None) -> jax.Array:
    """Local expert i multiplies its rows by `factors` [L, H] of i. Rows without a token become NaN, for combine
    must not read them. Quantised rows become `dtype`."""
    tokens = out.tokens if out.quant is None else jax_ep.dequantize(out, dtype)
    if out.layout.kind is FLAT:
        row_factors = factors[expert_of_rows(out.layout, tokens.shape[0])[0]]
    elif out.layout.kind is EXPERT_MAJOR:
        row_factors = factors[:, None]
    else:
        weights = out.topk_ids >= 0 if out.topk_weights is None else out.topk_weights
        row_factors = jnp.einsum("ck,ckh->ch", weights.astype(factors.dtype), factors[jnp.maximum(out.topk_ids, 0)])
    rows = (tokens.astype(row_factors.dtype) * row_factors).astype(tokens.dtype)
    return jnp.where(holds_token(out)[..., None], rows, jnp.nan)


def dispatch(comm, x, topk_ids, weights, quant: QuantConfig | None = None, came_quantised: bool = False):
    if came_quantised:
        x, scales = _quant.quantize(x, quant)
        quant = dataclasses.replace(quant, scales=scales)
    if comm.config.max_requests:
        return comm.dispatch_async(x, topk_ids, weights, quant=quant).wait()
    return comm.dispatch(x, topk_ids, weights, quant=quant)


def combine(comm, y, handle):
    return comm.combine_async(y, handle).wait() if comm.config.max_requests else comm.combine(y, handle)


def moe(comm, x, topk_ids, weights, factors, row_bias=None, **quant):
    out, handle = dispatch(comm, x, topk_ids, weights, **quant)
    if out.layout.kind is EXPERT_MAJOR and quant.get("came_quantised") and weights is None:
        out = with_zeros(out)  # neither x nor weights is differentiated
    y = apply_experts(out, factors, x.dtype)
    return combine(comm, y if row_bias is None else y + row_bias.reshape(y.shape), handle), out


def with_zeros(out: jax_ep.DispatchOutput) -> jax_ep.DispatchOutput:
    """In the slots of EXPERT_MAJOR that hold no token."""
    counts = out.layout.num_tokens_per_expert
    holds_token = (jnp.arange(out.tokens.shape[1]) < counts[:, None])[..., None]

    def filled(slots, value):
        return jnp.where(holds_token, slots, jnp.full((), value, slots.dtype))

    # Not zeros for scales: float8_e8m0fnu knows none, and makes NaN of it.
    quant = out.quant and dataclasses.replace(out.quant, scales=filled(out.quant.scales, 1))
    return dataclasses.replace(out, tokens=filled(out.tokens, 0), quant=quant)


def whole(comm, x, topk_ids, weights, factors):
    """`moe` of whole ops, whatever the communicator has room for."""
    out, handle = comm.dispatch(x, topk_ids, weights)
    return comm.combine(apply_experts(out, factors), handle)


def observed(out: jax_ep.DispatchOutput) -> jax_ep.DispatchOutput:
    """What shard_map can return of it, and what is defined."""
    quant = out.quant and dataclasses.replace(out.quant, straight_through=None)
    return dataclasses.replace(out, num_dropped=out.num_dropped[None], quant=quant)


def make_step(comm: jax_ep.MoECommunicator, case: Case) -> Callable[[Inputs], Result]:
    specs = input_specs(comm.mesh)

    def layer(x, weights, scale, gain, row_bias, topk_ids):
        weights = weights if case.weighted else None
        quant = dict(quant=case.quant, came_quantised=case.came_quantised)
        combined, out = moe(comm, x, topk_ids, weights, scale * gain, row_bias, **quant)
        return combined, observed(out)

    mapped = jax.shard_map(
        layer, mesh=comm.mesh, in_specs=specs[:6], out_specs=P(comm.mesh.axis_names), check_vma=case.check_vma
    )

    @jax.jit
    def step(inputs: Inputs) -> Result:
        out, pull, received = jax.vjp(lambda *args: mapped(*args, inputs.topk_ids), *inputs[:5], has_aux=True)
        return Result(received, out, pull(inputs.gradient))

    return step


def run(implementation: str, mesh: Mesh, case: Case, times: int = 1) -> list[Result]:
    with communicator(implementation, mesh, case) as comm:
        inputs = place(draw(case, mesh.size // case.num_ranks), mesh, comm.capacity)
        step = make_step(comm, case)
        results = [jax.block_until_ready(step(inputs)) for _ in range(times)]
        comm.check()
    return results


def quantised_and_back(x: np.ndarray, quant: QuantConfig) -> np.ndarray:
    elements, scales = jax.jit(lambda x: _quant.quantize(x, quant))(x)
    factors = np.repeat(np.asarray(_quant.scale_values(scales)), quant.block_size, axis=-1)
    return (np.asarray(elements).astype(np.float32) * factors).astype(x.dtype)


def dense(case: Case, inputs: Inputs, absolute: bool = False) -> tuple[np.ndarray, ...]:
    """The combined output and the gradients of x, weights, scale and gain if nothing is dropped, in float64; with
    `absolute`, the sums of their terms' absolute values, which their rounding errors are proportional to."""
    if case.quant is not None:
        inputs = inputs._replace(x=quantised_and_back(inputs.x, case.quant))
    if not case.weighted:
        inputs = inputs._replace(weights=np.ones_like(inputs.weights))
    wide = [np.asarray(array, np.float64) for array in inputs]
    x, weights, scale, gain, _, _, gradient = map(np.abs, wide) if absolute else wide
    used = inputs.topk_ids >= 0
    weights = np.where(used, weights, 0)
    scales = scale[inputs.topk_ids]  # [N, K, H]
    weighted_scales = np.einsum("nk,nkh->nh", weights, scales)
    weight_gradient = np.einsum("nh,nkh->nk", gradient * x * gain, scales) * used * case.weighted
    scale_gradient = np.zeros_like(scale)
    np.add.at(scale_gradient, inputs.topk_ids, weights[..., None] * (gradient * x * gain)[:, None])
    return (
        weighted_scales * gain * x,
        weighted_scales * gain * gradient * (not case.came_quantised),
        weight_gradient,
        scale_gradient,
        (weighted_scales * gradient * x).sum(0),
    )


# Comparison of what this process holds.


def local(array: jax.Array) -> Iterable[tuple[tuple[slice, ...], np.ndarray]]:
    for shard in array.addressable_shards:
        yield shard.index, np.asarray(shard.data)


def bits(array: np.ndarray) -> np.ndarray:
    """Its bytes as integers; all NaN are one."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = np.where(np.isnan(array), np.asarray(np.nan, array.dtype), array)
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assert_same(got, want) -> None:
    """Bitwise equality of two pytrees."""
    got_leaves, want_leaves = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert [path for path, _ in got_leaves] == [path for path, _ in want_leaves]
    for (path, got_leaf), (_, want_leaf) in zip(got_leaves, want_leaves, strict=True):
        assert (got_leaf.shape, got_leaf.dtype) == (want_leaf.shape, want_leaf.dtype), path
        for (index, got_part), (_, want_part) in zip(local(got_leaf), local(want_leaf), strict=True):
            same = bits(got_part) == bits(want_part)
            np.testing.assert_array_equal(
                got_part[~same], want_part[~same], err_msg=f"{jax.tree_util.keystr(path)} at {index}"
            )
            assert same.all(), f"{jax.tree_util.keystr(path)} at {index}: zeros of another sign"


def assert_rounded(name: str, dtype, got: jax.Array, want, terms: np.ndarray | None = None, num_terms: int = 1) -> None:
    """Equality up to rounding to `dtype`, or to that of `got`, of sums of `num_terms` terms, whose absolute values add
    up to `terms`."""
    info = max(jnp.finfo(dtype), jnp.finfo(got.dtype), key=lambda info: info.eps)
    precision = ROUNDINGS * (float(info.eps) + num_terms**0.5 * float(jnp.finfo(wide_dtype(dtype)).eps))
    want_at = {str(index): part for index, part in local(want)} if isinstance(want, jax.Array) else None
    for index, part in local(got):
        wanted = (want[index] if want_at is None else want_at[str(index)]).astype(np.float64)
        size = np.abs(wanted) if terms is None else terms[index]
        # Below the smallest normal number the dtype's steps stay as they are there, and float32 may be flushed to 0.
        allowed = precision * np.maximum(size, float(info.smallest_normal)) + FLUSHED
        error = np.abs(part.astype(np.float64) - wanted)
        assert (error <= allowed).all(), f"{name} at {index}: {np.max(error / allowed)} times what rounding explains"


RESULTS = ("out", "gradient of x", "gradient of weights", "gradient of scale", "gradient of gain")


def assert_results(case: Case, inputs: Inputs, got: Result, want: Iterable) -> None:
    """`want` holds what `RESULTS` names."""
    terms = dense(case, inputs, absolute=True)
    num_rows = inputs.topk_ids.size
    num_terms = (case.topk, case.topk, case.hidden_size, num_rows, num_rows)
    for name, array, *wanted in zip(RESULTS, (got.out, *got.gradients), want, terms, num_terms, strict=False):
        assert_rounded(name, case.dtype, array, *wanted)


def assert_dense(case: Case, inputs: Inputs, got: Result) -> None:
    assert_results(case, inputs, got, dense(case, inputs))


# The checks.


def repeatable(implementation: str, result: Result) -> Result:
    """What must be bitwise the same again: on GPUs, XLA adds up the gradients of the experts' parameters in no fixed
    order."""
    if implementation != "cuda":
        return result
    x, weights, _, _, *expert_output = result.gradients
    return result._replace(gradients=(x, weights, *expert_output))


def check_case(implementation: str, case: Case, mesh: Mesh | None = None) -> None:
    """Against the reference: what is received exactly, sums and gradients to rounding; and repeated runs bitwise."""
    mesh = make_mesh(implementation, case.num_ranks) if mesh is None else mesh
    inputs = draw(case, mesh.size // case.num_ranks)
    got, again = run(implementation, mesh, case, times=2)
    assert_same(repeatable(implementation, again), repeatable(implementation, got))
    if case.overflow == "error":
        assert_dense(case, inputs, got)
    if implementation == "reference":
        return
    (want,) = run("reference", mesh, case)
    assert_same(got.received, want.received)
    assert_results(case, inputs, got, (want.out, *want.gradients))
    assert_rounded("gradient of the expert output", case.dtype, got.gradients[-1], want.gradients[-1])


def check_halves(implementation: str, case: Case) -> None:
    """A layer of requests gives what a layer of whole ops does, bit for bit, gradients included."""
    mesh = make_mesh(implementation, case.num_ranks)
    (whole,) = run(implementation, mesh, dataclasses.replace(case, max_requests=0))
    (halves,) = run(implementation, mesh, dataclasses.replace(case, max_requests=1))
    assert_same(repeatable(implementation, halves), repeatable(implementation, whole))


def draw_magnitudes(rng: np.random.Generator, shape: tuple[int, int], dtype) -> np.ndarray:
    """Rows in which blocks of 32 are of one magnitude, any that float32 knows, or hold zeros, infinities or NaN."""
    num_blocks = shape[0] * shape[1] // 32
    exponents = rng.integers(-149, 129, (num_blocks, 1)) - rng.integers(0, 20, (num_blocks, 32))
    with np.errstate(over="ignore", invalid="ignore"):
        blocks = np.ldexp(rng.uniform(-2, 2, exponents.shape), exponents)
        for value, share in ((0.0, 0.2), (-0.0, 0.1), (np.inf, 0.05), (-np.inf, 0.05), (np.nan, 0.05)):
            blocks[rng.random(num_blocks) < share, rng.integers(32)] = value
        blocks[rng.random(num_blocks) < 0.1] = 0
        return blocks.reshape(shape).astype(np.float32).astype(dtype)


def receive_quantised(implementation: str, mesh: Mesh, case: Case) -> tuple[tuple[jax_ep.DispatchOutput, ...], ...]:
    """What a program that is not differentiated receives of each of `QUANTS`, quantised by dispatch and before it, with
    zeros where no token is."""
    inputs = draw(case, mesh.size // case.num_ranks)
    x = draw_magnitudes(np.random.default_rng(case.seed), inputs.x.shape, inputs.x.dtype)
    tokens = P(mesh.axis_names)
    with communicator(implementation, mesh, case) as comm:

        def defined(out):
            is_token, out = holds_token(out)[..., None], observed(out)
            tokens, quant = jax.tree.map(
                lambda rows: jnp.where(is_token, rows, jnp.zeros((), rows.dtype)), (out.tokens, out.quant)
            )
            return dataclasses.replace(out, tokens=tokens, quant=quant)

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=(tokens, tokens), out_specs=tokens, check_vma=case.check_vma)
        def forward(x, topk_ids):
            return tuple(
                tuple(defined(dispatch(comm, x, topk_ids, None, quant, came)[0]) for came in (False, True))
                for quant in QUANTS
            )

        return jax.block_until_ready(forward(put(x, mesh, tokens), put(inputs.topk_ids, mesh, tokens)))


def check_quantised(implementation: str, case: Case, mesh: Mesh | None = None) -> None:
    """All quantisations of rows of all magnitudes: what is received is the reference's bit for bit."""
    mesh = make_mesh(implementation, case.num_ranks) if mesh is None else mesh
    got = receive_quantised(implementation, mesh, case)
    for by_dispatch, before in got:
        assert_same(by_dispatch, before)
    if implementation != "reference":
        assert_same(got, receive_quantised("reference", mesh, case))
