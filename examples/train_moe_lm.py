"""Trains a small language model of bytes whose feed-forward layers are mixtures of experts, expert-parallel.

    python examples/train_moe_lm.py            # on all GPUs, or on 8 virtual CPU devices where there is none
    python examples/train_moe_lm.py --help

What it shows:

- `MoE`, an expert-parallel layer in Flax NNX: `dispatch`, `jax.lax.ragged_dot` and `combine` inside `jax.shard_map`.
  The experts are split over the mesh axis "ep". All other parameters are replicated, and the batch is split over the
  same axis: the dense part is data-parallel.
- `Trainer`: forward, backward and update in one jitted program with donated state.
- `check_against_reference`: a step with jax_ep's kernels against the same step with stock JAX collectives.

The text is Python's language reference, as `help()` shows it. A model that knew only how frequent each byte is would
have a loss of the text's unigram entropy; the trained one must be far under it, or the script fails.

Several processes can share one mesh, here two with four virtual CPU devices each:

    python examples/train_moe_lm.py --coordinator localhost:1234 --num-processes 2 --process-id 0 &
    python examples/train_moe_lm.py --coordinator localhost:1234 --num-processes 2 --process-id 1

On GPUs, say by the environment variable JAX_LOCAL_DEVICE_IDS which of them each process uses.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from text import NUM_BYTES, Text, printable
from tqdm import tqdm

import jax_ep

NUM_VIRTUAL_CPU_DEVICES = 8
HEAD_SIZE = 32
# Rows that a rank can receive, over what it receives when all experts are equally busy.
CAPACITY_FACTOR = 2
BALANCE_LOSS_WEIGHT = 0.01
DEFAULT_STEPS = 260
STEPS_PER_LOG = 20
PROMPT = b"The expression "
SAMPLE_TEMPERATURE = 0.5
# The share of the unigram entropy under which the validation loss must end.
GOAL = 0.75
# How far one step may be from the reference's, relative to the loss and to the update. GPUs multiply float32
# matrices with shorter mantissas, and add up gradients in no fixed order.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
GPU_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.1}


# ---- The model ----


class Stats(NamedTuple):
    """What a layer tells of its experts."""

    balance_loss: jax.Array  # [], 1 if all experts are equally likely
    load: jax.Array  # [E], the (token, k) that each expert received
    dropped: jax.Array  # [], the (token, k) that found no place


class MoE(nnx.Module):
    """A mixture of SwiGLU experts, of which each rank of the communicator's mesh axis holds its share."""

    def __init__(self, comm: jax_ep.MoECommunicator, *, rngs: nnx.Rngs):
        experts, hidden = comm.config.num_experts, comm.config.hidden_size
        inner = hidden
        init = nnx.initializers.lecun_normal()
        init_experts = nnx.initializers.lecun_normal(batch_axis=0)
        sharded = dict(out_sharding=("ep", None, None), mesh=comm.mesh)
        self.comm = comm
        self.router = nnx.Param(init(rngs.params(), (hidden, experts)))
        self.gate_up = nnx.Param(init_experts(rngs.params(), (experts, hidden, 2 * inner)), **sharded)
        self.down = nnx.Param(init_experts(rngs.params(), (experts, inner, hidden)), **sharded)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Stats]:
        """`x` [tokens, H], split over "ep" -> the same."""
        comm = self.comm

        @jax.shard_map(
            mesh=comm.mesh,
            in_specs=(P("ep"), P(), P("ep"), P("ep")),
            out_specs=(P("ep"), Stats(balance_loss=P(), load=P("ep"), dropped=P())),
        )
        def on_each_rank(x, router, gate_up, down):
            # In float32 whatever the dtype of x: small differences decide.
            probabilities = jax.nn.softmax(x.astype(jnp.float32) @ router)
            weights, topk_ids = jax.lax.top_k(probabilities, comm.config.topk)
            out, handle = comm.dispatch(x, topk_ids, weights / weights.sum(-1, keepdims=True))
            load = out.layout.num_tokens_per_expert
            y = swiglu(out.tokens, load, gate_up.astype(x.dtype), down.astype(x.dtype))
            stats = Stats(balance_loss(probabilities, topk_ids), load, jax.lax.psum(out.num_dropped, "ep"))
            return comm.combine(y, handle), stats

        return on_each_rank(x, self.router[...], self.gate_up[...], self.down[...])


def swiglu(tokens: jax.Array, num_tokens_per_expert: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """Each expert's feed-forward network (Shazeer, 2020), for its rows of `tokens` [C, H].

    By what JAX has; on GPUs `jax_ep.nn.default_grouped_matmul` is faster where tokamax is installed: see
    docs/performance.md.
    """
    gate, up = jnp.split(jax.lax.ragged_dot(tokens, gate_up, num_tokens_per_expert), 2, axis=-1)
    return jax.lax.ragged_dot(jax.nn.silu(gate) * up, down, num_tokens_per_expert)


def balance_loss(probabilities: jax.Array, topk_ids: jax.Array) -> jax.Array:
    """The auxiliary loss of the Switch Transformer (Fedus et al., 2021): busy experts become less probable."""
    num_experts = probabilities.shape[-1]
    load = jax.lax.pmean(jax.nn.one_hot(topk_ids, num_experts).mean((0, 1)), "ep")
    return num_experts * jnp.sum(load * jax.lax.pmean(probabilities.mean(0), "ep"))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, hidden: int, dtype, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.qkv = linear(hidden, 3 * hidden)
        self.out = linear(hidden, hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, hidden = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(batch, length, -1, HEAD_SIZE), 3, axis=2)
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y.reshape(batch, length, hidden))


def rotate(x: jax.Array, start: int | jax.Array = 0) -> jax.Array:
    """Rotary position embedding (Su et al., 2021) of `x` [batch, length, heads, head size], from position `start`."""
    half = x.shape[-1] // 2
    angles = (start + jnp.arange(x.shape[1]))[:, None, None] / 1e4 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


class Block(nnx.Module):
    """Attention, then a mixture of experts."""

    def __init__(self, comm: jax_ep.MoECommunicator, *, rngs: nnx.Rngs):
        hidden, dtype = comm.config.hidden_size, comm.config.dtype
        self.attention_norm = nnx.RMSNorm(hidden, dtype=dtype, rngs=rngs)
        self.attention = Attention(hidden, dtype, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(hidden, dtype=dtype, rngs=rngs)
        self.moe = MoE(comm, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Stats]:
        x = x + self.attention(self.attention_norm(x))
        y, stats = self.moe(self.moe_norm(x).reshape(-1, x.shape[-1]))
        return x + y.reshape(x.shape), stats


class LanguageModel(nnx.Module):
    """Bytes [batch, length] -> logits of the byte after each [batch, length, 256], and stats of each layer."""

    def __init__(self, comm: jax_ep.MoECommunicator, layers: int, *, rngs: nnx.Rngs):
        hidden, dtype = comm.config.hidden_size, comm.config.dtype
        self.embed = nnx.Embed(NUM_BYTES, hidden, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(Block(comm, rngs=rngs) for _ in range(layers))
        self.norm = nnx.RMSNorm(hidden, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(hidden, NUM_BYTES, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, text: jax.Array) -> tuple[jax.Array, Stats]:
        x, stats = self.embed(text), []
        for block in self.blocks:
            x, block_stats = block(x)
            stats.append(block_stats)
        return self.head(self.norm(x)).astype(jnp.float32), jax.tree.map(lambda *layers: jnp.stack(layers), *stats)


# ---- Training ----


def loss_of(model: LanguageModel, batch: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Stats]]:
    """What training minimises; and the loss in nats per byte, and the stats. `batch` uint8 [batch, seq_len + 1]."""
    logits, stats = model(batch[:, :-1].astype(jnp.int32))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:].astype(jnp.int32)).mean()
    return loss + BALANCE_LOSS_WEIGHT * stats.balance_loss.sum(), (loss, stats)


class Trainer:
    """A model and its optimizer, as jitted functions of their state: one pytree, alike for all communicators."""

    def __init__(self, comm: jax_ep.MoECommunicator, args: argparse.Namespace):
        def create():
            model = LanguageModel(comm, args.layers, rngs=nnx.Rngs(args.seed))
            return model, nnx.Optimizer(model, optimizer_of(args), wrt=nnx.Param)

        self.comm = comm
        self.graph, abstract_state = nnx.split(nnx.eval_shape(create))
        sharded, replicated = nnx.get_named_sharding(abstract_state, comm.mesh), NamedSharding(comm.mesh, P())
        self.init = jax.jit(lambda: nnx.state(create()), out_shardings=sharded)
        self.train_step = jax.jit(self._train_step, donate_argnums=0, out_shardings=(sharded, replicated))
        self.validation_loss = jax.jit(self._validation_loss, out_shardings=replicated)
        self.sample = jax.jit(self._sample, out_shardings=replicated)

    def _train_step(self, state, batch):
        model, optimizer = nnx.merge(self.graph, state)
        (_, seen), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model, batch)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), seen

    def _validation_loss(self, state, batch):
        model, _ = nnx.merge(self.graph, state)
        return loss_of(model, batch)[1][0]

    def _sample(self, state, text, key):
        """Writes over all of `text` [batch, length] after the prompt, byte by byte."""
        model, _ = nnx.merge(self.graph, state)

        def write_byte(i, text):
            logits = model(text)[0][:, i - 1]
            return text.at[:, i].set(jax.random.categorical(jax.random.fold_in(key, i), logits / SAMPLE_TEMPERATURE))

        return jax.lax.fori_loop(len(PROMPT), text.shape[1], write_byte, text)


def optimizer_of(args: argparse.Namespace) -> optax.GradientTransformation:
    # The rate starts above zero, so that even the first step, which gets checked, moves the parameters.
    peak = args.learning_rate
    rate = optax.warmup_cosine_decay_schedule(peak / 10, peak, args.steps // 10, args.steps, end_value=peak / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01))


def check_against_reference(trainer: Trainer, reference: Trainer, batch: jax.Array) -> str:
    """Takes a step from the same state with both, and compares the losses and the updated parameters."""

    @jax.jit
    def compare(start, state, expected):
        difference, update = optax.tree.sub(state, expected), optax.tree.sub(expected, start)
        return optax.tree.norm(difference, ord=jnp.inf), optax.tree.norm(difference) / optax.tree.norm(update)

    state, (loss, _) = jax.block_until_ready(trainer.train_step(trainer.init(), batch))
    expected, (expected_loss, _) = jax.block_until_ready(reference.train_step(trainer.init(), batch))
    trainer.comm.check()
    loss_difference = abs(float(loss) - float(expected_loss))
    largest, relative = jax.device_get(compare(trainer.init()[0], state[0], expected[0]))
    report = (
        f"loss {loss:.6f}, differs by {loss_difference:.1e}; updated parameters differ by at most {largest:.1e}, "
        f"in norm by {relative:.1e} of the update"
    )
    on_gpu = trainer.comm.mesh.devices.flat[0].platform == "gpu"
    tolerance = (GPU_TOLERANCE if on_gpu else TOLERANCE)[trainer.comm.config.dtype.name]
    # In norm, since Adam turns even a gradient that is rounding noise into a whole step.
    if not (loss_difference <= tolerance * float(expected_loss) and relative <= tolerance):
        sys.exit(f"One step is not what the reference implementation makes of it: {report}.")
    return report


@dataclasses.dataclass
class History:
    """What training saw: the losses in nats per byte, and each layer's load [layers, E] and dropped share."""

    losses: list[float] = dataclasses.field(default_factory=list)
    validation: dict[int, float] = dataclasses.field(default_factory=dict)
    loads: list[np.ndarray] = dataclasses.field(default_factory=list)
    dropped: list[float] = dataclasses.field(default_factory=list)

    def add(self, loss: np.ndarray, stats: Stats) -> None:
        self.losses.append(float(loss))
        self.loads.append(stats.load)
        self.dropped.append(stats.dropped.sum() / (stats.load.sum() + stats.dropped.sum()))

    def recent_load(self) -> np.ndarray:
        """[layers, E]: tokens per expert and step, lately."""
        return np.mean(self.loads[-STEPS_PER_LOG:], axis=0)


def train(trainer: Trainer, text: Text, steps: int, say):
    """Returns the trained state, and the history."""
    state, history = trainer.init(), History()
    validation = text.validation_batches(4)
    for step in tqdm(range(1, steps + 1), desc="training", unit="step", disable=jax.process_index() > 0):
        state, seen = trainer.train_step(state, text.training_batch(step))
        # Waits for the step: launches that queue up can hang XLA's collectives on CPU.
        history.add(*jax.device_get(seen))
        if step % STEPS_PER_LOG and step < steps:
            continue
        trainer.comm.check()
        history.validation[step] = np.mean([float(trainer.validation_loss(state, batch)) for batch in validation])
        load = history.recent_load()
        say(
            f"step {step:4}: loss {np.mean(history.losses[-STEPS_PER_LOG:]):.3f}, validation "
            f"{history.validation[step]:.3f} (unigram entropy {text.entropy:.3f}); busiest expert "
            f"{(load / load.mean()).max():.1f} x balanced, dropped {np.mean(history.dropped[-STEPS_PER_LOG:]):.1%}"
        )
    return state, history


# ---- What one sees ----


def load_table(load: np.ndarray) -> str:
    """Bars of the tokens per expert, a row per layer; a half-high bar is the balanced load."""
    lines = ["tokens per expert and step, lately:"]
    for layer, tokens in enumerate(load):
        heights = np.minimum(np.rint(tokens / tokens.mean() * 4), 8).astype(int)
        bars = "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)
        lines.append(f"  layer {layer} |{bars}| {tokens.min():.0f} to {tokens.max():.0f}, mean {tokens.mean():.0f}")
    return "\n".join(lines)


def plot(history: History, entropy: float, output: pathlib.Path) -> None:
    """Loss over steps on the left, the layers' expert load on the right."""
    load = history.recent_load()
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    axes = left.subplots()
    axes.plot(range(1, len(history.losses) + 1), history.losses, color="C0", alpha=0.5, label="training")
    axes.plot(history.validation.keys(), history.validation.values(), "o-", color="C0", label="validation")
    axes.axhline(entropy, color="C3", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss [nats/byte]", title="Loss", ylim=(0, None))
    axes.legend()
    for layer, bars in enumerate(right.subplots(len(load), 1, sharex=True, sharey=True, squeeze=False)[:, 0]):
        bars.bar(range(load.shape[1]), load[layer], color="C2")
        bars.axhline(load[layer].mean(), color="black", linewidth=0.8, linestyle=":")
        bars.set_ylabel(f"layer {layer}")
        bars.margins(x=0.01)
    bars.set_xlabel("expert")
    right.suptitle("Tokens per expert and step")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def continuation(trainer: Trainer, state, text: Text, args: argparse.Namespace) -> str:
    """What the model writes after `PROMPT`."""
    prompts = np.zeros((trainer.comm.num_ranks, args.seq_len), np.int32)
    prompts[:, : len(PROMPT)] = np.frombuffer(PROMPT, np.uint8)
    samples = jax.device_get(trainer.sample(state, text.put(prompts), jax.random.key(args.seed)))
    return printable(samples[0])


# ---- The command ----


def parse_arguments(argv=None) -> argparse.Namespace:
    description, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=DEFAULT_STEPS, help="training steps")
    add("--batch", type=int, default=16, help="sequences per step, over all devices")
    add("--seq-len", type=int, default=128, help="bytes per sequence")
    add("--layers", type=int, default=2, help="transformer blocks, each with one MoE layer")
    add("--hidden", type=int, default=128, help=f"elements per token, a multiple of {HEAD_SIZE}")
    add("--experts", type=int, default=16, help="experts per layer, over all devices")
    add("--topk", type=int, default=2, help="experts per token")
    add("--learning-rate", type=float, default=6e-3, help="at its peak")
    add("--implementation", choices=("cuda", "cpu", "reference"), help="of jax_ep; None: by the devices")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations; parameters are float32")
    add("--output", type=pathlib.Path, default=pathlib.Path("out/train_moe_lm.png"), help="the plot")
    add("--seed", type=int, default=0, help="of parameters, batches and the sample")
    add_process_arguments(parser)
    args = parser.parse_args(argv)
    if args.hidden % HEAD_SIZE:
        parser.error(f"--hidden: expected a multiple of {HEAD_SIZE}, got {args.hidden}")
    if args.seq_len <= len(PROMPT):
        parser.error(f"--seq-len: expected more than the {len(PROMPT)} bytes of the prompt, got {args.seq_len}")
    return args


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of jax.distributed, where several processes train together")
    add("--num-processes", type=int, default=1, help="with --coordinator")
    add("--process-id", type=int, default=0, help="with --coordinator")


def start_jax(args: argparse.Namespace, num_cpu_devices: int = NUM_VIRTUAL_CPU_DEVICES) -> None:
    """Starts the process's part of `jax.distributed`; without GPUs, with its part of that many virtual CPU devices."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Of no effect on GPUs.
        jax.config.update("jax_num_cpu_devices", max(1, num_cpu_devices // args.num_processes))
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)


def make_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    """All devices of all processes along "ep"."""
    start_jax(args)
    mesh = jax.make_mesh((jax.device_count(),), ("ep",), axis_types=(AxisType.Auto,))
    if args.batch % mesh.size:
        sys.exit(f"--batch: expected a multiple of the {mesh.size} devices, got {args.batch}")
    return mesh


def open_text(mesh: jax.sharding.Mesh, args: argparse.Namespace) -> Text:
    return Text(NamedSharding(mesh, P("ep")), batch=args.batch, seq_len=args.seq_len, seed=args.seed)


def make_communicator(mesh, args: argparse.Namespace, implementation: str | None) -> jax_ep.MoECommunicator:
    tokens = args.batch // mesh.size * args.seq_len
    return jax_ep.MoECommunicator(
        mesh,
        num_experts=args.experts,
        hidden_size=args.hidden,
        topk=args.topk,
        max_tokens_per_rank=tokens,
        # More than all tokens of all ranks cannot come.
        max_recv_tokens_per_rank=min(CAPACITY_FACTOR, mesh.size) * tokens * args.topk,
        overflow="drop",
        dtype=args.dtype,
        implementation=implementation,
    )


def main(argv=None) -> None:
    start, args = time.perf_counter(), parse_arguments(argv)
    mesh = make_mesh(args)
    text = open_text(mesh, args)
    say = tqdm.write if jax.process_index() == 0 else lambda _: None
    say(f"{text.num_bytes:,} bytes of {text.name}, unigram entropy {text.entropy:.3f} nats/byte")
    with make_communicator(mesh, args, args.implementation) as comm, make_communicator(mesh, args, "reference") as ref:
        trainer = Trainer(comm, args)
        say(
            f"{args.layers} layers of {args.experts} experts, top {args.topk}, {args.dtype}; {mesh.size} "
            f"{mesh.devices.flat[0].platform} devices with {comm.num_local_experts} experts and room for "
            f"{comm.capacity} rows each, implementation {comm.config.implementation}"
        )
        report = check_against_reference(trainer, Trainer(ref, args), text.training_batch(1))
        say(f"One step is the reference implementation's: {report}.")
        state, history = train(trainer, text, args.steps, say)
        say(load_table(history.recent_load()))
        say(f"A sample:\n---\n{continuation(trainer, state, text, args)}\n---")
    if jax.process_index() == 0:
        plot(history, text.entropy, args.output)
    loss = history.validation[args.steps]
    say(
        f"Validation loss {loss:.3f} nats/byte, {loss / text.entropy:.0%} of the unigram entropy {text.entropy:.3f}; "
        f"{time.perf_counter() - start:.0f} s; plot in {args.output}"
    )
    if args.steps >= DEFAULT_STEPS and not loss < GOAL * text.entropy:
        sys.exit(f"It did not learn: expected a validation loss under {GOAL:.0%} of the unigram entropy.")


if __name__ == "__main__":
    main()
