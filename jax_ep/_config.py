"""The configuration of a communicator: its checks, its defaults, and the shape that it makes."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _ffi
from jax_ep._checks import expect, expect_dtype, expect_int, expect_mesh, expect_number
from jax_ep._shapes import MoEShape, worst_case_capacity
from jax_ep.types import DispatchLayout, MoEMode

_IMPLEMENTATIONS = ("cuda", "cpu", "reference")
_PLATFORMS = {"cuda": "gpu", "cpu": "cpu"}
_MAX_TIMEOUT_S = 1e6
# Every block holds all ranks' ids, and a counter for each expert, in its shared memory.
_MAX_LATENCY_IDS, _MAX_LATENCY_EXPERTS = 2**16, 2**14


@dataclasses.dataclass(frozen=True)
class MoECommunicatorConfig:
    """The arguments of `MoECommunicator`, see there."""

    num_experts: int
    hidden_size: int
    topk: int
    max_tokens_per_rank: int
    axis_name: str = "ep"
    mode: MoEMode = MoEMode.HIGH_THROUGHPUT
    output_layout: DispatchLayout | None = None
    max_recv_tokens_per_rank: int | None = None
    overflow: str = "error"
    expert_alignment: int = 1
    dtype: Any = jnp.bfloat16
    max_requests: int = 0
    implementation: str | None = None
    num_sms: int | None = None
    dispatch_blocks: tuple[int, int] | None = None
    combine_blocks: tuple[int, int] | None = None
    timeout_s: float = 30.0


def resolve_config(mesh: jax.sharding.Mesh, config: MoECommunicatorConfig) -> MoECommunicatorConfig:
    """Checks all that needs no shape algebra, and fills in the defaults. What means the same is equal afterwards."""
    expect_mesh(mesh)
    expect(config.axis_name in mesh.axis_names, "axis_name", f"one of {mesh.axis_names}", repr(config.axis_name))
    config = _with_ints(_with_environment(config))
    expect(isinstance(config.mode, MoEMode), "mode", "a MoEMode", repr(config.mode))
    expect(config.topk <= 32, "topk", "at most 32", config.topk)
    expect(config.overflow in ("error", "drop"), "overflow", '"error" or "drop"', repr(config.overflow))
    # No wait is unbounded.
    timeout_s = expect_number("timeout_s", config.timeout_s)
    expect(0 < timeout_s <= _MAX_TIMEOUT_S, "timeout_s", f"seconds above 0, up to {_MAX_TIMEOUT_S:g}", timeout_s)
    dtype = expect_dtype("dtype", config.dtype, _ffi.DTYPES)
    num_ranks = mesh.shape[config.axis_name]
    expect(
        config.num_experts % num_ranks == 0, "num_experts", f"a multiple of the {num_ranks} ranks", config.num_experts
    )
    low_latency = config.mode is MoEMode.LOW_LATENCY
    layout = config.output_layout
    if layout is None:
        layout = DispatchLayout.EXPERT_MAJOR if low_latency else DispatchLayout.FLAT
    expect(isinstance(layout, DispatchLayout), "output_layout", "a DispatchLayout", repr(layout))
    if layout is DispatchLayout.EXPERT_MAJOR:
        expect(low_latency, "output_layout", "FLAT or RANK_MAJOR in mode HIGH_THROUGHPUT", layout)
        capacity = config.max_recv_tokens_per_rank
        expect(capacity is None, "max_recv_tokens_per_rank", "None with output_layout EXPERT_MAJOR", capacity)
    if layout is not DispatchLayout.FLAT:
        alignment = config.expert_alignment
        expect(alignment == 1, "expert_alignment", f"1 with output_layout {layout.name}", alignment)
    implementation = _resolve_implementation(mesh, config)
    if implementation == "cuda":
        row_bytes = config.hidden_size * dtype.itemsize
        expect(row_bytes % 16 == 0, "hidden_size", "rows of a multiple of 16 bytes on CUDA", f"{row_bytes} bytes")
    if implementation == "cuda" and low_latency:
        most_tokens = _MAX_LATENCY_IDS // (num_ranks * config.topk)
        mode = "in mode LOW_LATENCY on CUDA"
        tokens = config.max_tokens_per_rank
        expect(tokens <= most_tokens, "max_tokens_per_rank", f"at most {most_tokens} {mode}", tokens)
        experts = config.num_experts
        expect(experts <= _MAX_LATENCY_EXPERTS, "num_experts", f"at most {_MAX_LATENCY_EXPERTS} {mode}", experts)
    return dataclasses.replace(
        config, output_layout=layout, implementation=implementation, dtype=dtype, timeout_s=timeout_s
    )


def _with_ints(config: MoECommunicatorConfig) -> MoECommunicatorConfig:
    """Sizes may come as numpy's integers; as ints they are the same to all processes, and do not overflow."""
    ints: dict[str, Any] = {}
    for name in ("num_experts", "hidden_size", "topk", "max_tokens_per_rank", "expert_alignment"):
        ints[name] = expect_int(name, getattr(config, name))
    ints["max_requests"] = expect_int("max_requests", config.max_requests, minimum=0)
    for name in ("max_recv_tokens_per_rank", "num_sms"):
        if getattr(config, name) is not None:
            ints[name] = expect_int(name, getattr(config, name))
    for name in ("dispatch_blocks", "combine_blocks"):
        blocks = getattr(config, name)
        if blocks is not None:
            expect(isinstance(blocks, tuple) and len(blocks) == 2, name, "(senders, receivers)", repr(blocks))
            ints[name] = tuple(expect_int(name, count) for count in blocks)
    for name, value in ints.items():
        for count in value if isinstance(value, tuple) else (value,):
            expect(count < 2**31, name, "less than 2**31", count)
    return dataclasses.replace(config, **ints)


def _with_environment(config: MoECommunicatorConfig) -> MoECommunicatorConfig:
    """Environment variables set what the caller left open."""

    def given(value, name: str, count: int):
        text = os.environ.get(name)
        if value is not None or not text:
            return value
        wanted = "1 integer" if count == 1 else f"{count} integers, separated by a comma"
        try:
            numbers = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"{name}: expected {wanted}, got {text!r}") from None
        expect(len(numbers) == count and min(numbers) > 0, name, f"{wanted}, at least 1", repr(text))
        return numbers if count > 1 else numbers[0]

    return dataclasses.replace(
        config,
        num_sms=given(config.num_sms, "JAX_EP_NUM_SMS", 1),
        dispatch_blocks=given(config.dispatch_blocks, "JAX_EP_DISPATCH_BLOCKS", 2),
        combine_blocks=given(config.combine_blocks, "JAX_EP_COMBINE_BLOCKS", 2),
    )


def _resolve_implementation(mesh: jax.sharding.Mesh, config: MoECommunicatorConfig) -> str:
    platform = mesh.devices.flat[0].platform
    if config.implementation is None:
        return {"gpu": "cuda", "cpu": "cpu"}.get(platform, "reference")
    names = ", ".join(f'"{name}"' for name in _IMPLEMENTATIONS)
    expect(config.implementation in _IMPLEMENTATIONS, "implementation", f"one of {names}", repr(config.implementation))
    needed = _PLATFORMS.get(config.implementation, platform)
    expect(platform == needed, "mesh", f'{needed} devices for implementation="{config.implementation}"', platform)
    return config.implementation


def moe_shape(mesh: jax.sharding.Mesh, config: MoECommunicatorConfig) -> MoEShape:
    """Of a config that `resolve_config` returned."""
    assert config.output_layout is not None
    num_ranks = mesh.shape[config.axis_name]
    worst = worst_case_capacity(
        num_ranks=num_ranks,
        num_local_experts=config.num_experts // num_ranks,
        topk=config.topk,
        max_tokens_per_rank=config.max_tokens_per_rank,
        expert_alignment=config.expert_alignment,
        layout=config.output_layout,
    )
    capacity = worst if config.max_recv_tokens_per_rank is None else config.max_recv_tokens_per_rank
    is_expert_major = config.output_layout is DispatchLayout.EXPERT_MAJOR
    sizing = "max_tokens_per_rank" if is_expert_major else "max_recv_tokens_per_rank"
    expect(capacity < 2**31, sizing, "fewer than 2**31 rows", capacity)
    return MoEShape(
        num_ranks=num_ranks,
        num_experts=config.num_experts,
        topk=config.topk,
        hidden_size=config.hidden_size,
        max_tokens_per_rank=config.max_tokens_per_rank,
        capacity=capacity,
        expert_alignment=config.expert_alignment,
        layout=config.output_layout,
    )
