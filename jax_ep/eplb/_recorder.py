"""Loads of the last steps, from which plans are made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_ep import _ffi
from jax_ep._checks import expect, expect_array, expect_int
from jax_ep._placement import ExpertPlacement, expect_placement
from jax_ep.types import DispatchHandle, DispatchOutput

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LoadRecorder:
    """Counts the (token, k) of each logical expert over a sliding window of steps. Functional: the window is an array
    that the program carries, through jit, scan and checkpoints.

    Args:
      num_experts: E, logical experts.
      axis_name: the communicator's mesh axis.
      data_axes: further mesh axes whose positions have tokens of their own; a name or several.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """

    num_experts: int
    axis_name: str = "ep"
    data_axes: str | tuple[str, ...] = ()

    def __post_init__(self):
        axes = (self.data_axes,) if isinstance(self.data_axes, str) else tuple(self.data_axes)
        distinct = len(set(axes) - {self.axis_name}) == len(axes)
        expect(distinct, "data_axes", f"distinct axes besides {self.axis_name!r}", axes)
        object.__setattr__(self, "num_experts", expect_int("num_experts", self.num_experts))
        object.__setattr__(self, "data_axes", axes)

    def init(self, window: int) -> Array:
        """int32 `[window, E]`, zeros: a window of that many steps."""
        window = expect_int("window", window)
        return jnp.zeros((window, self.num_experts), jnp.int32)

    def record(
        self,
        state: Array,
        received: DispatchOutput | DispatchHandle | Array,
        placement: ExpertPlacement | None = None,
    ) -> Array:
        """Puts a step into the window, from which the oldest falls out. Call inside `jax.shard_map`; costs one `psum`.

        Args:
          state: the window so far; the same on all ranks.
          received: what `dispatch` returned, either of the two: counts what arrived, and so not what was dropped. Or
            int32 `[T, K]`, logical experts as `dispatch` takes them: counts all that are experts.
          placement: that of the dispatch; without one, slots are experts.

        Returns:
          The window, the same on all ranks. Its numbers are exact up to 2**31 - 1.

        Raises:
          ValueError, TypeError: an argument is unusable, or the call is not inside `jax.shard_map`.
        """
        return self.push(state, self.count(received, placement))

    def load(self, state: Array) -> Array:
        """int32 `[E]`, the sum over the window: exact up to 2**31 - 1."""
        return state.sum(0, dtype=jnp.int32)

    def count(
        self, received: DispatchOutput | DispatchHandle | Array, placement: ExpertPlacement | None = None
    ) -> Array:
        """int32 `[E]`, of all ranks: what `record` puts into the window."""
        axes = (self.axis_name, *self.data_axes)
        manual = jax.sharding.get_abstract_mesh().manual_axes
        for axis in axes:
            argument = "axis_name" if axis == self.axis_name else "data_axes"
            expect(axis in manual, argument, f"an axis of the jax.shard_map around it, one of {manual}", repr(axis))
        if isinstance(received, DispatchOutput | DispatchHandle):
            experts, counts = self._of_slots(received, placement)
        else:
            expect_array("received", received, ("T", "K"), jnp.int32)
            experts, counts = received.reshape(-1), jnp.ones((received.size,), jnp.int32)
        experts = jnp.where((experts >= 0) & (experts < self.num_experts), experts, self.num_experts)
        zeros = jnp.zeros((self.num_experts,), jnp.int32)
        mine = zeros.at[experts].add(counts, mode="drop")
        return jax.lax.psum(_ffi.vary(mine, axes), axes)

    def push(self, state: Array, counts: Array) -> Array:
        """The window with `counts` int32 `[E]` as its last step. Anywhere, also outside `shard_map`."""
        expect_array("state", state, ("window", self.num_experts), jnp.int32)
        expect_array("counts", counts, (self.num_experts,), jnp.int32)
        return jnp.concatenate([state[1:], counts[None]])

    def _of_slots(self, received, placement: ExpertPlacement | None) -> tuple[Array, Array]:
        """The experts of a rank's slots [L], and what they received."""
        counts = received.layout.num_tokens_per_expert
        num_local = counts.shape[0]
        num_slots = num_local * jax.lax.axis_size(self.axis_name)
        first = jax.lax.axis_index(self.axis_name) * num_local
        if placement is None:
            expect(num_slots == self.num_experts, "placement", f"one of {num_slots} slots", "None")
            return first + jnp.arange(num_local, dtype=jnp.int32), counts
        expect_placement("placement", placement)
        sizes = placement.num_slots, placement.num_experts
        wanted = f"{num_slots} slots and {self.num_experts} experts"
        expect(sizes == (num_slots, self.num_experts), "placement", wanted, f"{sizes[0]} and {sizes[1]}")
        return jax.lax.dynamic_slice_in_dim(placement.physical_to_logical, first, num_local), counts
