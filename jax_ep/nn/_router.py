"""`Router`: which experts a token goes to, and with what weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_ep import _ffi
from jax_ep._checks import expect, expect_dtype, expect_floating, expect_int, expect_number

_SCORES = ("softmax", "sigmoid")
# Added to the sum of a token's weights, as in DeepSeek-V3: sigmoids may all be zero.
_TINY = 1e-20


class SelectionBias(nnx.Variable):
    """float32 `[E]`, added to the scores when experts are chosen. No `nnx.Param`: neither `nnx.grad` nor an optimizer
    of parameters touches it."""


class RouterAux(NamedTuple):
    """Means over tokens, of which the means over ranks with as many tokens each are those over all tokens.

    Attributes:
      load: float32 `[E]`, each expert's share of all (token, k); sums to 1. Not differentiable.
      probability: float32 `[E]`, the mean of each token's scores, which are scaled to sum to 1.
      z_loss: float32 `[]`, the mean of `logsumexp(logits) ** 2` (ST-MoE, Zoph et al., 2022).
    """

    load: jax.Array
    probability: jax.Array
    z_loss: jax.Array

    @property
    def balance_loss(self) -> jax.Array:
        """float32 `[]`, `E * sum(load * probability)` (Switch Transformer, Fedus et al., 2021); 1 if all experts are
        equally likely. Of means over ranks, it is the loss of all tokens together."""
        return self.load.shape[-1] * jnp.sum(self.load * self.probability, axis=-1)


class Router(nnx.Module):
    """Chooses `topk` experts for each token, and their weights, in float32 whatever the tokens' dtype.

    Scores are a softmax over the experts, or sigmoids. Chosen are the `topk` experts of the highest score, with
    `num_groups` only among the experts of a token's `topk_groups` best groups, where a group counts as the sum of its
    two best scores (DeepSeek-V3, 2024). The weights are the scores of the chosen experts. `normalize_weights` divides
    them by their sum: with a softmax that is the same as choosing by logits, and taking the softmax of the chosen.

    `selection_bias` balances the load without a loss (Wang et al., 2024): experts are chosen by score plus bias,
    and weighted by score alone. `update_bias` moves the bias, after each step or whenever the program wishes.

    Args:
      hidden_size: H, elements per token.
      num_experts: E.
      topk: K, experts per token.
      score: "softmax" or "sigmoid".
      normalize_weights: whether each token's weights are made to sum to 1.
      scaling_factor: what the weights are multiplied by in the end.
      num_groups: of neighbouring experts, equally many in each.
      topk_groups: groups that a token's experts come from; default all.
      selection_bias: whether there is a bias.
      kernel_init: of the kernel `[H, E]`.
      param_dtype: of the kernel.
      rngs: draws the kernel, from stream `params`.

    Raises:
      ValueError, TypeError: an argument is unusable; the text names it, what was expected and what came.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        topk: int,
        *,
        score: str = "softmax",
        normalize_weights: bool = True,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        topk_groups: int | None = None,
        selection_bias: bool = False,
        kernel_init: Callable = nnx.initializers.lecun_normal(),  # noqa: B008
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        topk_groups = num_groups if topk_groups is None else topk_groups
        sizes = dict(
            hidden_size=hidden_size, num_experts=num_experts, topk=topk, num_groups=num_groups, topk_groups=topk_groups
        )
        hidden_size, num_experts, topk, num_groups, topk_groups = (
            expect_int(name, value) for name, value in sizes.items()
        )
        expect(score in _SCORES, "score", '"softmax" or "sigmoid"', repr(score))
        expect(num_experts % num_groups == 0, "num_groups", f"a divisor of the {num_experts} experts", num_groups)
        expect(topk_groups <= num_groups, "topk_groups", f"at most {num_groups}, the num_groups", topk_groups)
        num_eligible = topk_groups * (num_experts // num_groups)
        expect(topk <= num_eligible, "topk", f"at most {num_eligible}, the experts of topk_groups groups", topk)
        dtype = expect_dtype("param_dtype", param_dtype, _ffi.DTYPES)
        self.hidden_size, self.num_experts, self.topk = hidden_size, num_experts, topk
        self.score, self.normalize_weights = score, bool(normalize_weights)
        self.scaling_factor = expect_number("scaling_factor", scaling_factor)
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.kernel = nnx.Param(kernel_init(rngs.params(), (hidden_size, num_experts), dtype))
        self.bias = SelectionBias(jnp.zeros((num_experts,), jnp.float32)) if selection_bias else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, RouterAux]:
        """Routes tokens.

        Args:
          x: `[T, H]`, of any floating dtype. Differentiable.

        Returns:
          `topk_ids` int32 `[T, K]`; `weights` float32 `[T, K]`, differentiable in `x` and the kernel; and the aux,
          of these tokens.

        Raises:
          ValueError, TypeError: `x` has another shape, or no floating dtype.
        """
        expect_floating("x", x)
        fits = x.ndim == 2 and x.shape[1] == self.hidden_size
        expect(fits, "x", f"shape [T, {self.hidden_size}]", f"shape {list(x.shape)}")
        # No shorter mantissas: small differences decide.
        logits = jnp.matmul(
            x.astype(jnp.float32), self.kernel[...].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        scores = jax.nn.softmax(logits) if self.score == "softmax" else jax.nn.sigmoid(logits)
        topk_ids = self._choose(jax.lax.stop_gradient(scores))
        weights = jnp.take_along_axis(scores, topk_ids, axis=-1)
        if self.normalize_weights:
            weights = weights / (weights.sum(-1, keepdims=True) + _TINY)
        return topk_ids, weights * self.scaling_factor, _aux(logits, scores, topk_ids)

    def _choose(self, scores: jax.Array) -> jax.Array:
        """int32 [T, K], by scores [T, E]."""
        if self.bias is not None:
            scores = scores + jax.lax.stop_gradient(self.bias[...])
        if self.topk_groups < self.num_groups:
            by_group = scores.reshape(-1, self.num_groups, self.num_experts // self.num_groups)
            best_two, _ = jax.lax.top_k(by_group, min(2, by_group.shape[-1]))
            _, groups = jax.lax.top_k(best_two.sum(-1), self.topk_groups)
            is_eligible = jax.nn.one_hot(groups, self.num_groups, dtype=bool).any(1)
            scores = jnp.where(is_eligible[..., None], by_group, -jnp.inf).reshape(scores.shape)
        return jax.lax.top_k(scores, self.topk)[1].astype(jnp.int32)

    def update_bias(self, load: jax.Array, rate: float = 1e-3) -> None:
        """Makes experts that got more than their share less likely to be chosen, and the others more likely.

        Args:
          load: `[E]`, of all ranks: tokens per expert, or their shares as in `RouterAux` and `MoEAux`.
          rate: how far each bias moves, whatever the distance from balance.

        Raises:
          ValueError: the router has no bias, or `load` has another shape.
        """
        if self.bias is None:
            raise ValueError("selection_bias: expected True for update_bias, got False")
        expect(load.shape == (self.num_experts,), "load", f"shape [{self.num_experts}]", f"shape {list(load.shape)}")
        load = load.astype(jnp.float32)
        self.bias[...] += rate * jnp.sign(load.mean() - load)


def _aux(logits: jax.Array, scores: jax.Array, topk_ids: jax.Array) -> RouterAux:
    shares = scores / (scores.sum(-1, keepdims=True) + _TINY)
    num_tokens = max(1, scores.shape[0])  # of none, the means are zero
    counts = jax.nn.one_hot(topk_ids, scores.shape[-1], dtype=jnp.float32).sum((0, 1))
    return RouterAux(
        load=counts / (num_tokens * topk_ids.shape[1]),
        probability=shares.sum(0) / num_tokens,
        z_loss=jnp.square(jax.nn.logsumexp(logits, axis=-1)).sum() / num_tokens,
    )
