"""One workload on one mesh: its arrays and its communicator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ep import MoECommunicator, MoEMode, _shapes
from jax_ep.bench.timing import AXIS
from jax_ep.bench.workloads import Traffic, Workload


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What ranks dispatch: arrays of all ranks, and what their routing makes ranks move."""

    x: jax.Array
    topk_ids: jax.Array
    weights: jax.Array
    traffic: Traffic


class Problem:
    """To be closed: use it as a context manager. Further arguments are the communicator's."""

    def __init__(self, workload: Workload, mesh: Mesh, dtype=jnp.bfloat16, **arguments):
        self.workload, self.mesh, self.dtype, self.num_ranks = workload, mesh, dtype, mesh.shape[AXIS]
        self._routing = workload.routing(self.num_ranks)
        self.traffic = Traffic.of(workload, self._routing, self.num_ranks)
        # What a skewed routing needs, where that is more than balanced routing would.
        self.capacity = max(workload.capacity, _shapes.align_up(self.traffic.rows_received, 128))
        self.comm = self.communicator(**arguments)
        self.topk_ids = self.shard(self._routing)
        self.weights = self.shard(workload.weights(self.num_ranks))
        self.x = self.random((self.num_ranks * workload.num_tokens, workload.hidden_size), seed=2)

    def communicator(self, **arguments) -> MoECommunicator:
        workload = self.workload
        mode = arguments.get("mode", MoEMode.LOW_LATENCY if workload.low_latency else MoEMode.HIGH_THROUGHPUT)
        return MoECommunicator(
            self.mesh,
            **dict(
                axis_name=AXIS,
                mode=mode,
                num_experts=workload.num_experts,
                hidden_size=workload.hidden_size,
                topk=workload.topk,
                max_tokens_per_rank=workload.num_tokens,
                # There a row has its slot, whatever the routing.
                max_recv_tokens_per_rank=None if mode is MoEMode.LOW_LATENCY else self.capacity,
                dtype=self.dtype,
            )
            | arguments,
        )

    @property
    def row_bytes(self) -> int:
        return self.workload.hidden_size * jnp.dtype(self.dtype).itemsize

    def shard(self, array: np.ndarray) -> jax.Array:
        """An array of all ranks, of which every process makes its own part."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def random(self, shape, seed: int) -> jax.Array:
        """Normal values, made where they are needed: on the host they would take longer than the benchmark."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        make = jax.jit(lambda key: jax.random.normal(key, shape, self.dtype), out_shardings=sharding)
        return make(jax.random.key(seed))

    def map(self, fn: Callable, *args):
        """`fn` on every rank's part of `args`."""
        spec = PartitionSpec(AXIS)
        return jax.jit(jax.shard_map(fn, mesh=self.mesh, in_specs=spec, out_specs=spec))(*args)

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.x, self.topk_ids, self.weights, self.traffic)

    def first(self, num_tokens: int) -> Inputs:
        """The first of each rank's tokens."""
        routing = self._routing.reshape(self.num_ranks, -1, self.workload.topk)[:, :num_tokens]
        traffic = Traffic.of(self.workload, routing.reshape(-1, self.workload.topk), self.num_ranks)
        arrays = self.map(lambda *a: [every[:num_tokens] for every in a], self.x, self.topk_ids, self.weights)
        x, topk_ids, weights = arrays
        return Inputs(x, topk_ids, weights, traffic)

    def handle(self):
        """A handle of this routing, with a dimension of ranks before each array's own: scalars are sharded too."""

        def route(x, topk_ids, weights):
            handle = self.comm.dispatch(x, topk_ids, weights)[1]
            return jax.tree.map(lambda a: a[None], handle)

        return self.map(route, self.x, self.topk_ids, self.weights)

    def __enter__(self) -> Problem:
        return self

    def __exit__(self, *_) -> None:
        self.comm.destroy()


def unstacked(handle):
    """Inside shard_map: this rank's handle."""
    return jax.tree.map(lambda a: a[0], handle)


def on_host(replicated: jax.Array) -> np.ndarray:
    """The value of an array that every device holds whole, also where other processes hold some of them."""
    return np.asarray(replicated.addressable_data(0))
