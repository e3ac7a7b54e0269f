"""What a program calls, as functions of arrays alone, and the rows that it gets."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_ep import CombineRequest, DispatchHandle, DispatchOutput, DispatchRequest, MoECommunicator, QuantConfig
from jax_ep.bench.problem import unstacked

_QUANT_BLOCK = 128


def quant_config(hidden_size: int) -> QuantConfig:
    """float8_e4m3fn with a float32 scale for 128 elements, or for as many as divide a small row."""
    return QuantConfig(block_size=math.gcd(_QUANT_BLOCK, hidden_size))


def quantized_row_bytes(hidden_size: int) -> int:
    """Of the elements and their scales."""
    quant = quant_config(hidden_size)
    sizes = jnp.dtype(quant.dtype).itemsize, jnp.dtype(quant.scale_dtype).itemsize
    return hidden_size * sizes[0] + hidden_size // quant.block_size * sizes[1]


class Received(NamedTuple):
    """What dispatch gave a rank."""

    tokens: jax.Array
    row_weights: jax.Array
    num_tokens_per_expert: jax.Array
    scales: jax.Array | None

    @staticmethod
    def of(out: DispatchOutput, handle: DispatchHandle) -> Received:
        assert handle.row_weights is not None  # weights were given
        scales = None if out.quant is None else out.quant.scales
        return Received(out.tokens, handle.row_weights, out.layout.num_tokens_per_expert, scales)

    def counts(self) -> jax.Array:
        return self.num_tokens_per_expert

    def flat(self, capacity: int) -> Received:
        """What came in EXPERT_MAJOR as FLAT has it."""
        counts = self.num_tokens_per_expert
        row_weights = self.row_weights.reshape(self.tokens.shape[:2])
        return Received(
            rows_of_slots(self.tokens, counts, capacity),
            rows_of_slots(row_weights, counts, capacity),
            counts,
            None if self.scales is None else rows_of_slots(self.scales, counts, capacity),
        )


def rows_of_slots(slots, num_tokens_per_expert, capacity: int):
    """[L, S, ...] -> [C, ...]: what holds a token, one after the other, and zeros, whatever the other slots hold."""
    ends = jnp.cumsum(num_tokens_per_expert, dtype=jnp.int32)
    row = jnp.arange(capacity, dtype=jnp.int32)
    local = jnp.searchsorted(ends, row, side="right", method="compare_all").astype(jnp.int32)
    holds_token = (local < ends.size).reshape(-1, *(1,) * (slots.ndim - 2))
    local = jnp.minimum(local, ends.size - 1)
    rows = slots.at[local, row - (ends - num_tokens_per_expert)[local]].get(mode="clip")
    return jnp.where(holds_token, rows, jnp.zeros((), slots.dtype))


class Layer:
    """Call its methods inside `jax.shard_map`."""

    def __init__(self, comm: MoECommunicator):
        self._comm = comm

    def fresh(self, changing, x) -> Received:
        topk_ids, weights = changing
        return Received.of(*self._comm.dispatch(x, topk_ids, weights))

    def quantized(self, changing, x) -> Received:
        topk_ids, weights = changing
        return Received.of(*self._comm.dispatch(x, topk_ids, weights, quant=quant_config(x.shape[1])))

    def cached(self, weights, x, handle):
        out, new = self._comm.dispatch(x, None, weights, previous_handle=unstacked(handle))
        return out.tokens, new.row_weights

    def start_fresh(self, changing, x) -> DispatchRequest:
        topk_ids, weights = changing
        return self._comm.dispatch_async(x, topk_ids, weights)

    def combine(self, row_weights, y, handle):
        return self._comm.combine(y, dataclasses.replace(unstacked(handle), row_weights=row_weights))

    def start_combine(self, row_weights, y, handle) -> CombineRequest:
        return self._comm.combine_async(y, dataclasses.replace(unstacked(handle), row_weights=row_weights))

    def dispatch_backward(self, row_gradients, gradients, x, weights, handle):
        pull = jax.vjp(lambda x, w: self.cached(w, x, handle), x, weights)[1]
        return pull((gradients, row_gradients))

    def combine_backward(self, row_weights, gradients, y, handle):
        return jax.vjp(lambda y, w: self.combine(w, y, handle), y, row_weights)[1](gradients)

    def forward(self, changing, x):
        topk_ids, weights = changing
        out, handle = self._comm.dispatch(x, topk_ids, weights)
        return self._comm.combine(out.tokens, handle)

    def forward_of(self, x, topk_ids, weights):
        """`forward`, whose result can be its next tokens."""
        return self.forward((topk_ids, weights), x)

    def forward_and_backward(self, changing, x, gradients):
        topk_ids, weights = changing
        out, pull = jax.vjp(lambda x, w: self.forward((topk_ids, w), x), x, weights)
        return out, pull(gradients)
