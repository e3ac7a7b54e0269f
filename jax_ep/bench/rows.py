"""What is measured: each row an op on one communicator, and the bytes it cannot avoid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ep import MoECommunicator
from jax_ep.bench.timing import Times, measure
from jax_ep.bench.workloads import Traffic, Workload

AXIS = "ep"


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    implementation: str
    times: Times
    link_passes: int  # payload rows cross the link this many times
    local_rows: int  # rows of H elements that a rank reads and writes at least


class Problem:
    """One workload's arrays and communicator on one mesh."""

    def __init__(self, workload: Workload, mesh: Mesh, implementation: str | None, dtype=jnp.bfloat16):
        num_ranks = mesh.shape[AXIS]
        self.workload, self.mesh, self.dtype = workload, mesh, dtype
        routing = workload.routing(num_ranks)
        self.traffic = Traffic.of(workload, routing, num_ranks)
        self.comm = MoECommunicator(
            mesh,
            axis_name=AXIS,
            num_experts=workload.num_experts,
            hidden_size=workload.hidden_size,
            topk=workload.topk,
            max_tokens_per_rank=workload.num_tokens,
            max_recv_tokens_per_rank=max(workload.capacity, self.traffic.rows_received),
            dtype=dtype,
            implementation=implementation,
        )
        self.topk_ids = self._shard(routing)
        self.weights = self._shard(workload.weights(num_ranks))
        self.x = self._random((num_ranks * workload.num_tokens, workload.hidden_size), 2)

    def _shard(self, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def _random(self, shape, seed: int) -> jax.Array:
        """Normal values, made where they are needed: on the host they would take longer than the benchmark."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        make = jax.jit(lambda key: jax.random.normal(key, shape, self.dtype), out_shardings=sharding)
        return make(jax.random.key(seed))

    def map(self, fn: Callable, *args):
        spec = PartitionSpec(AXIS)
        return jax.jit(jax.shard_map(fn, mesh=self.mesh, in_specs=spec, out_specs=spec))(*args)

    def time(self, op: Callable, *args) -> Times:
        return measure(op, self.mesh, args, axis_name=AXIS)

    def handle(self):
        """A handle of this routing, whose scalars are arrays of one element so that they can be sharded."""

        def route(x, topk_ids, weights):
            handle = self.comm.dispatch(x, topk_ids, weights)[1]
            return jax.tree.map(lambda leaf: leaf.reshape(1) if leaf.ndim == 0 else leaf, handle)

        return self.map(route, self.x, self.topk_ids, self.weights)


def _unstacked(handle):
    """Inside shard_map: the handle with its scalars as scalars."""
    return dataclasses.replace(
        handle,
        num_dropped=handle.num_dropped.reshape(()),
        routing=jax.tree.map(lambda leaf: leaf.reshape(()) if leaf.size == 1 else leaf, handle.routing),
    )


def measure_rows(problem: Problem, implementation: str, only: str | None = None) -> Iterator[Row]:
    """Times every op in turn. The first operand of each is what changes from call to call, see `timing`."""
    comm, workload, traffic = problem.comm, problem.workload, problem.traffic
    tokens, received = workload.num_tokens, traffic.rows_received
    handle = problem.handle()
    x, topk_ids, weights = problem.x, problem.topk_ids, problem.weights

    def fresh(changing, weights):
        x, topk_ids = changing
        return comm.dispatch(x, topk_ids, weights)[0].tokens

    def cached(x, weights, handle):
        out, new = comm.dispatch(x, None, weights, previous_handle=_unstacked(handle))
        return out.tokens, new.row_weights

    def combine(y, row_weights, handle):
        return comm.combine(y, dataclasses.replace(_unstacked(handle), row_weights=row_weights))

    def dispatch_backward(gradients, row_gradients, x, weights, handle):
        return jax.vjp(lambda x, w: cached(x, w, handle), x, weights)[1]((gradients, row_gradients))

    def combine_backward(changing, row_weights, handle):
        gradients, y = changing
        return jax.vjp(lambda y, w: combine(y, w, handle), y, row_weights)[1](gradients)

    def forward(changing, weights):
        x, topk_ids = changing
        out, handle = comm.dispatch(x, topk_ids, weights)
        return comm.combine(out.tokens, handle)

    def forward_and_backward(changing, weights):
        x, topk_ids, gradients = changing
        out, pull = jax.vjp(lambda x, w: forward((x, topk_ids), w), x, weights)
        return out, pull(gradients)

    y = problem.map(lambda x, w, h: cached(x, w, h)[0], x, weights, handle)
    row_weights = handle.row_weights
    once, twice = tokens + received, 2 * (tokens + received)
    for name, op, args, passes, rows in (
        ("dispatch, fresh routing", fresh, ((x, topk_ids), weights), 1, once),
        ("dispatch, cached handle", cached, (x, weights, handle), 1, once),
        ("combine, weighted", combine, (y, row_weights, handle), 1, once),
        ("dispatch backward", dispatch_backward, (y, row_weights, x, weights, handle), 1, once),
        ("combine backward", combine_backward, ((x, y), row_weights, handle), 1, once + received),
        ("forward", forward, ((x, topk_ids), weights), 2, twice),
        ("forward + backward", forward_and_backward, ((x, topk_ids, x), weights), 4, 2 * twice + received),
    ):
        if only is None or only in name:
            yield Row(name, implementation, problem.time(op, *args), passes, rows)


def measure_copy(problem: Problem, rows: int) -> Times:
    """A plain copy, in one program of the same kind, that reads and writes `rows` rows of H elements in all on
    every device: half of them read, half written."""
    shape = (problem.mesh.shape[AXIS] * (rows // 2), problem.workload.hidden_size)
    source = problem._random(shape, 3)
    return problem.time(lambda source: -source, source)
