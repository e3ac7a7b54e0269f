"""The ops that are measured: what each calls, on what, and the rows that it cannot avoid moving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jax_ep import MoECommunicator
from jax_ep.bench.problem import Problem, unstacked


@dataclasses.dataclass(frozen=True)
class Op:
    """`fn(changing, *fixed)`, see `timing.chain`."""

    name: str
    fn: Callable
    changing: Any
    fixed: tuple
    num_calls: int  # custom calls that it makes
    link_passes: int  # how often each (token, rank) crosses the link
    local_rows: int  # rows of H elements that a rank reads and writes at least


class Layer:
    """What a program calls, as functions of arrays alone."""

    def __init__(self, comm: MoECommunicator):
        self._comm = comm

    def fresh(self, changing, x):
        topk_ids, weights = changing
        out, handle = self._comm.dispatch(x, topk_ids, weights)
        return out.tokens, handle.row_weights

    def cached(self, weights, x, handle):
        out, new = self._comm.dispatch(x, None, weights, previous_handle=unstacked(handle))
        return out.tokens, new.row_weights

    def combine(self, row_weights, y, handle):
        return self._comm.combine(y, dataclasses.replace(unstacked(handle), row_weights=row_weights))

    def dispatch_backward(self, row_gradients, gradients, x, weights, handle):
        pull = jax.vjp(lambda x, w: self.cached(w, x, handle), x, weights)[1]
        return pull((gradients, row_gradients))

    def combine_backward(self, row_weights, gradients, y, handle):
        return jax.vjp(lambda y, w: self.combine(w, y, handle), y, row_weights)[1](gradients)

    def forward(self, changing, x):
        topk_ids, weights = changing
        out, handle = self._comm.dispatch(x, topk_ids, weights)
        return self._comm.combine(out.tokens, handle)

    def forward_and_backward(self, changing, x, gradients):
        topk_ids, weights = changing
        out, pull = jax.vjp(lambda x, w: self.forward((topk_ids, w), x), x, weights)
        return out, pull(gradients)


def all_ops(problem: Problem) -> list[Op]:
    """Every op on the problem's arrays. What changes from call to call is small: it exists once per call."""
    layer, x = Layer(problem.comm), problem.x
    ids_and_weights = (problem.topk_ids, problem.weights)
    handle = problem.handle()
    y, row_weights = problem.map(layer.cached, problem.weights, x, handle)
    # T tokens, N rows that hold one, and C rows in all: those without a token have to be zeroed.
    t, n, c = problem.workload.num_tokens, problem.traffic.rows_received, problem.capacity
    dispatched, combined = t + c, n + t
    # The gradient of a weighted combine is a dispatch that also reads what was combined.
    combine_gradient = t + n + c
    return [
        Op("dispatch, fresh routing", layer.fresh, ids_and_weights, (x,), 1, 1, dispatched),
        Op("dispatch, cached handle", layer.cached, problem.weights, (x, handle), 1, 1, dispatched),
        Op("combine, weighted", layer.combine, row_weights, (y, handle), 1, 1, combined),
        Op(
            "dispatch backward",
            layer.dispatch_backward,
            row_weights,
            (y, x, problem.weights, handle),
            1,
            1,
            combined,
        ),
        Op("combine backward", layer.combine_backward, row_weights, (x, y, handle), 1, 1, combine_gradient),
        Op("forward", layer.forward, ids_and_weights, (x,), 2, 2, dispatched + combined),
        Op(
            "forward + backward",
            layer.forward_and_backward,
            ids_and_weights,
            (x, x),
            4,
            4,
            dispatched + combined + combine_gradient + combined,
        ),
    ]
