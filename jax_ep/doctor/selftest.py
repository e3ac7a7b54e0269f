"""A tiny layer on each backend, forward and backward, against a loop in numpy."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jax_ep import MoECommunicator, MoECommunicatorConfig, MoEMode, _ffi
from jax_ep.doctor.findings import SelfTest

_T, _H, _K, _LOCAL_EXPERTS = 8, 16, 2, 2
_TOLERANCE = 1e-4
_TIMEOUT_S = 20.0


def run_self_tests() -> Iterator[SelfTest]:
    """In both modes, on every backend that has devices here and whose extension loads."""
    for implementation, devices in available().items():
        for mode in MoEMode:
            start = time.perf_counter()
            try:
                check_layer(implementation, mode, devices)
                error = None
            except Exception as failure:  # whatever it is, it is what was looked for
                error = f"{type(failure).__name__}: {failure}"
            yield SelfTest(implementation, mode.value, len(devices), time.perf_counter() - start, error)


def available() -> dict[str, list[jax.Device]]:
    """The devices that each usable implementation has in this process."""
    found = {"reference": jax.local_devices()}
    for implementation, platform in (("cpu", "cpu"), ("cuda", "cuda")):
        try:
            devices = jax.local_devices(backend=platform)
            _ffi.extension(implementation)
        except Exception:  # a backend that is not there, an extension that does not load: told elsewhere
            continue
        found[implementation] = devices
    return found


def check_layer(implementation: str, mode: MoEMode, devices: list[jax.Device]) -> None:
    """Raises if outputs or gradients are not what they should be."""
    num_ranks = len(devices)
    num_experts = num_ranks * _LOCAL_EXPERTS
    rng = np.random.default_rng(0)
    x, gradient = rng.standard_normal((2, num_ranks * _T, _H)).astype(np.float32)
    weights = rng.random((num_ranks * _T, _K)).astype(np.float32)
    factors = rng.standard_normal(num_experts).astype(np.float32)
    topk_ids = np.argsort(rng.random((num_ranks * _T, num_experts)), axis=1)[:, :_K].astype(np.int32)
    topk_ids[0, -1] = -1
    mesh = Mesh(np.array(devices), ("ep",), axis_types=(AxisType.Auto,))
    config = MoECommunicatorConfig(
        num_experts=num_experts,
        hidden_size=_H,
        topk=_K,
        max_tokens_per_rank=_T,
        mode=mode,
        dtype=jnp.float32,
        implementation=implementation,
        timeout_s=_TIMEOUT_S,
    )
    with MoECommunicator(mesh, config) as comm:
        layer = jax.shard_map(
            lambda x, weights, factors, topk_ids: _layer(comm, x, weights, factors, topk_ids),
            mesh=mesh,
            in_specs=PartitionSpec("ep"),
            out_specs=PartitionSpec("ep"),
        )

        @jax.jit
        def step(x, weights, factors, topk_ids, gradient):
            out, pull = jax.vjp(lambda *args: layer(*args, topk_ids), x, weights, factors)
            return out, *pull(gradient)

        got = jax.block_until_ready(step(x, weights, factors, topk_ids, gradient))
        comm.check()
    for name, a, b in zip(
        ("the output", "the gradient of x", "the gradient of weights", "the gradient of the experts"),
        got,
        by_loop(x, weights, factors, topk_ids, gradient),
        strict=True,
    ):
        different = int((~np.isclose(np.asarray(a), b, rtol=_TOLERANCE, atol=_TOLERANCE)).sum())
        if different:
            raise AssertionError(f"{name}: {different} of {b.size} elements are wrong")


def _layer(comm: MoECommunicator, x, weights, factors, topk_ids):
    """Each expert multiplies its rows by a number of its own."""
    out, handle = comm.dispatch(x, topk_ids, weights)
    if out.tokens.ndim == 3:
        return comm.combine(out.tokens * factors[:, None, None], handle)
    rows = jnp.arange(out.tokens.shape[0], dtype=jnp.int32)
    experts = (rows[:, None] >= out.layout.offsets[1:-1]).sum(1, dtype=jnp.int32)
    return comm.combine(out.tokens * factors[experts][:, None], handle)


def by_loop(x, weights, factors, topk_ids, gradient) -> tuple[np.ndarray, ...]:
    """The output, and the gradients of x, weights and factors, one (token, k) after the other."""
    out, x_gradient = np.zeros_like(x), np.zeros_like(x)
    weights_gradient, factors_gradient = np.zeros_like(weights), np.zeros_like(factors)
    for token, k in np.ndindex(*topk_ids.shape):
        expert, weight = topk_ids[token, k], weights[token, k]
        if expert < 0:
            continue
        out[token] += weight * factors[expert] * x[token]
        x_gradient[token] += weight * factors[expert] * gradient[token]
        weights_gradient[token, k] = factors[expert] * (x[token] @ gradient[token])
        factors_gradient[expert] += weight * (x[token] @ gradient[token])
    return out, x_gradient, weights_gradient, factors_gradient
