"""Sends a stream of tokens that prefers some experts through a mixture-of-experts layer, and rebalances it on the way.

    python examples/rebalance.py            # on all GPUs, or on 8 virtual CPU devices where there is none
    python examples/rebalance.py --help

The layer has a few more slots than experts. Every so many steps it plans where experts and replicas go from the load of
the last steps, and moves their parameters there. Halfway the stream turns to other experts.

What it shows:

- `step`: `MoE.record_load` inside a compiled step.
- `run`: `MoE.rebalance` between steps, which compiles nothing but the transfer, and leaves the layer's outputs as they
  are.
- `make_rows_per_rank`: `jax_ep.load_statistics` of a dispatch through the placement.
- `matmul_of_blocks`: a grouped matrix product whose time is that of the rows that came, as a kernel's is.
- `draw`: the most loaded rank's rows and the time of a step, before and after each rebalancing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import jax_ep
from jax_ep.eplb import EplbCommunicator
from jax_ep.nn import MoE, Router

NUM_VIRTUAL_CPU_DEVICES = 8
# Of the largest output. Replicas are on other ranks afterwards, so sums are taken, and rounded, in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
# Groups of rows start at multiples of it.
BLOCK = 128


@dataclasses.dataclass
class History:
    """Of each step: the rows of the busiest rank and of the mean, and seconds. And of each rebalancing."""

    busiest: list[int] = dataclasses.field(default_factory=list)
    mean: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    moves: dict[int, int] = dataclasses.field(default_factory=dict)  # by the step before which they were
    moving_seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def spans(self, num_steps: int) -> list[range]:
        """The steps between rebalancings."""
        edges = [0, *self.moves, num_steps]
        return [range(first, end) for first, end in zip(edges, edges[1:], strict=False)]


def matmul_of_blocks(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """`rows` [C, X], kernels [L, X, Y], multiples of BLOCK int32 [L] -> [C, Y], a block after the other. Not
    differentiable in reverse mode."""
    last_blocks = jnp.cumsum(sizes, dtype=jnp.int32) // BLOCK

    def one_block(i, y):
        kernel = kernels[(i >= last_blocks).sum(dtype=jnp.int32)]
        block = jax.lax.dynamic_slice_in_dim(rows, i * BLOCK, BLOCK)
        return jax.lax.dynamic_update_slice_in_dim(y, block @ kernel, i * BLOCK, 0)

    y = jax.lax.pcast(jnp.zeros((len(rows), kernels.shape[2]), rows.dtype), "ep", to="varying")
    return jax.lax.fori_loop(0, last_blocks[-1], one_block, y)


def make_communicator(mesh: jax.sharding.Mesh, args: argparse.Namespace) -> jax_ep.MoECommunicator:
    return jax_ep.MoECommunicator(
        mesh,
        num_experts=args.slots,
        hidden_size=args.hidden,
        topk=args.topk,
        max_tokens_per_rank=args.tokens,
        expert_alignment=BLOCK,
        dtype=args.dtype,
        implementation=args.implementation,
    )


def make_layer(comm: jax_ep.MoECommunicator, args: argparse.Namespace) -> MoE:
    rngs = nnx.Rngs(args.seed)
    router = Router(args.hidden, args.experts, args.topk, score="sigmoid", selection_bias=True, rngs=rngs)
    slots = dict(num_slots=args.slots, load_window=args.every)
    return MoE(router, args.inner, communicator=comm, grouped_matmul=matmul_of_blocks, **slots, rngs=rngs)


@nnx.jit
def step(layer: MoE, x: jax.Array) -> jax.Array:
    y, aux = layer(x)
    layer.record_load(aux)
    return y


def make_rows_per_rank(layer: MoE):
    """What each rank receives of `x`, int32 [R]."""
    comm = layer.communicator
    graph, _ = nnx.split(layer.router)

    @jax.jit
    @jax.shard_map(mesh=comm.mesh, in_specs=(P("ep"), P(), P()), out_specs=P())
    def count(x, router_state, placement):
        topk_ids, _, _ = nnx.merge(graph, router_state)(x)
        _, handle = comm.dispatch(x.astype(comm.config.dtype), topk_ids, placement=placement)
        return jax_ep.load_statistics(handle).rows_per_rank

    return lambda x: np.asarray(count(x, nnx.state(layer.router), layer.placement))


def run(layer: MoE, mover: EplbCommunicator, args: argparse.Namespace) -> History:
    """Sends `args.steps` batches, and rebalances every `args.every` of them."""
    rows_per_rank, history, comm = make_rows_per_rank(layer), History(), layer.communicator
    rng = np.random.default_rng(args.seed)
    favour = rng.normal(size=args.experts) * args.skew  # of a token's scores, which are between 0 and 1
    by_rank, everywhere = NamedSharding(comm.mesh, P("ep")), NamedSharding(comm.mesh, P())

    def draw() -> jax.Array:
        shape = comm.num_ranks * args.tokens, args.hidden
        return jax.device_put(rng.normal(size=shape).astype(np.float32), by_rank)

    def turn() -> None:
        layer.router.bias[...] = jax.device_put(rng.permutation(favour).astype(np.float32), everywhere)

    forward, probe = nnx.jit(lambda layer, x: layer(x)[0]), draw()
    turn()
    for _ in range(2):  # compiles; once more, for variables that come back from a program
        jax.block_until_ready(step(layer, probe))
    for number in range(args.steps):
        if number == args.steps // 2:
            turn()
        if number and number % args.every == 0:
            before = np.asarray(forward(layer, probe), np.float64)
            start = time.perf_counter()
            history.moves[number] = layer.rebalance(slack=args.slack, communicator=mover)
            history.moving_seconds[number] = time.perf_counter() - start
            check_outputs(np.asarray(forward(layer, probe), np.float64), before, args.dtype)
        x = jax.block_until_ready(draw())
        start = time.perf_counter()
        jax.block_until_ready(step(layer, x))
        history.seconds.append(time.perf_counter() - start)
        rows = rows_per_rank(x)
        history.busiest.append(int(rows.max()))
        history.mean.append(float(rows.mean()))
    comm.check()
    return history


def check_outputs(after: np.ndarray, before: np.ndarray, dtype: str) -> None:
    error = np.abs(after - before).max() / np.abs(before).max()
    if not error <= TOLERANCE[dtype]:
        sys.exit(f"Rebalancing changed the outputs by {error:.1e} of the largest.")


def print_table(history: History, args: argparse.Namespace) -> None:
    print("steps      busiest rank's rows   over the mean   ms a step   moves before   ms to move")
    for span in history.spans(args.steps):
        steps = slice(span.start, span.stop)
        busiest = np.mean(history.busiest[steps])
        imbalance = np.mean(np.divide(history.busiest[steps], history.mean[steps]))
        milliseconds = np.median(history.seconds[steps]) * 1e3
        moved = "           -            -"
        if span.start in history.moves:
            moved = f"{history.moves[span.start]:12d} {history.moving_seconds[span.start] * 1e3:12.1f}"
        name = f"{span.start}-{span.stop - 1}"
        print(f"{name:10s} {busiest:19.0f} {imbalance:15.2f} {milliseconds:11.2f}   {moved}")


def draw(history: History, args: argparse.Namespace) -> Figure:
    """Rows and time of each step, and their medians between rebalancings."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    load, duration = figure.subplots(2, sharex=True)
    milliseconds = np.array(history.seconds) * 1e3
    load.set_title("dotted: rebalanced; red: the stream turns to other experts")
    load.plot(history.mean, color="black", linewidth=1, linestyle="--", label="mean of the ranks")
    for panel, values, what in ((load, history.busiest, "most loaded rank"), (duration, milliseconds, "all ranks")):
        panel.plot(values, alpha=0.5, label=f"{what}, each step")
        spans = history.spans(args.steps)
        medians = [np.median(values[span.start : span.stop]) for span in spans]
        edges = [span.start - 0.5 for span in spans], [span.stop - 0.5 for span in spans]
        panel.hlines(medians, *edges, color="C0", linewidth=2, label=f"{what}, median between rebalancings")
        for number in history.moves:
            panel.axvline(number - 0.5, color="gray", linestyle=":")
        panel.axvline(args.steps // 2 - 0.5, color="C3", linewidth=1)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize="small")
    load.set_ylabel("rows a step")
    duration.set(xlabel="step", ylabel="ms a step")
    return figure


def plot(history: History, path: pathlib.Path, args: argparse.Namespace) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(history, args).savefig(path, dpi=150)
    print(f"wrote {path}")


# ---- The command ----


def parse_arguments(argv=None) -> argparse.Namespace:
    description, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=40, help="batches; the stream turns to other experts halfway")
    add("--every", type=int, default=10, help="steps between rebalancings, and that each plans from")
    add("--tokens", type=int, default=256, help="per device and step")
    add("--hidden", type=int, default=128, help="elements per token")
    add("--inner", type=int, default=256, help="hidden elements of an expert")
    add("--experts", type=int, default=30, help="need not be a multiple of the devices")
    add("--topk", type=int, default=4, help="experts per token")
    add("--slots", type=int, help="for experts and replicas on all devices; None: 2 or more per device to spare")
    add("--skew", type=float, default=0.3, help="how much the stream prefers some experts")
    add("--slack", type=float, default=0.05, help="how much less even a plan may be that moves less")
    add("--dtype", choices=tuple(TOLERANCE), default="float32", help="of tokens and matrix products")
    add("--devices", type=int, help=f"None: all GPUs, or {NUM_VIRTUAL_CPU_DEVICES} virtual CPU devices")
    add("--implementation", choices=("cuda", "cpu", "reference"), help="of jax_ep; None: by the devices")
    add("--output", type=pathlib.Path, default=pathlib.Path("out/rebalance.png"), help="the plot")
    add("--seed", type=int, default=0, help="of parameters and tokens")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.every < 1:
        parser.error(f"--steps, --every: expected at least 2 and 1, got {args.steps} and {args.every}")
    return args


def make_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Of no effect on GPUs.
        jax.config.update("jax_num_cpu_devices", args.devices or NUM_VIRTUAL_CPU_DEVICES)
    devices = jax.devices()[: args.devices]
    return jax.make_mesh((len(devices),), ("ep",), axis_types=(AxisType.Auto,), devices=devices)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    mesh = make_mesh(args)
    if args.slots is None:
        args.slots = (-(-args.experts // mesh.size) + 2) * mesh.size
    with make_communicator(mesh, args) as comm, EplbCommunicator(mesh) as mover:
        print(
            f"{args.experts} experts in {args.slots} slots, top {args.topk}, {args.tokens} tokens a rank, on "
            f"{mesh.size} {mesh.devices.flat[0].platform} devices, implementation {comm.config.implementation}"
        )
        history = run(make_layer(comm, args), mover, args)
    print_table(history, args)
    print(f"Rebalanced {len(history.moves)} times; the outputs stayed as they were, up to rounding.")
    plot(history, args.output, args)


if __name__ == "__main__":
    main()
