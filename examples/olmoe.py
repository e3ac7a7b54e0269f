"""Trains a decoder of the shape of OLMoE-1B-7B (Muennighoff et al., 2024) on text, with checkpoints.

    python examples/olmoe.py                                             # tiny: all GPUs, or 8 virtual CPU devices
    python examples/olmoe.py --checkpoint out/olmoe --save-every 50      # then once more, with --resume
    python examples/olmoe.py --size olmoe-1b-7b --dtype bfloat16 --remat --text FILE
    python examples/olmoe.py --help

Every layer has 64 experts, of which a token takes 8: SwiGLU, no shared experts, a softmax router with a load-balancing
and a z loss. Attention has rotary positions and normalised queries and keys. `--size` and the flags after it scale the
model; `olmoe-1b-7b` has the published dimensions, but reads bytes.

What it shows:

- `Block`: `jax_ep.nn.MoE` in a model that is otherwise plain Flax. All layers share one communicator, and so its arena.
- `Trainer`: `nnx.jit` with the shardings that the layers carry as metadata. Batches are split over the mesh axes "data"
  and "ep", experts over "ep"; all else is replicated.
- `Checkpoints`: orbax, written while training goes on. A run that stops and resumes on as many devices computes, bit
  by bit, what one that never stopped computes; one that resumes on other devices starts from the same bits.

Several processes share a mesh as in train_moe_lm.py: --coordinator, --num-processes, --process-id. They write and
read the same checkpoint directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import train_moe_lm
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from orbax.checkpoint.checkpoint_managers import LatestN
from text import NUM_BYTES, Text
from tqdm import tqdm

import jax_ep
from jax_ep.nn import MoE, MoEAux, Router

# What `--size` stands for; each can be changed by its own flag.
SIZES = {
    "tiny": dict(hidden=64, layers=2, heads=4, inner=32, seq_len=64, batch=16, learning_rate=1e-2, steps=200),
    "small": dict(hidden=512, layers=8, heads=8, inner=256, seq_len=512, batch=64, learning_rate=1e-3, steps=2000),
    "olmoe-1b-7b": dict(
        hidden=2048, layers=16, heads=16, inner=1024, seq_len=4096, batch=16, learning_rate=4e-4, steps=20000
    ),
}
# With these, what is computed follows from the devices alone. A checkpoint is resumed with the same.
SETTINGS = (
    *SIZES["tiny"],
    *("experts", "topk", "vocabulary", "warmup", "capacity_factor", "bias_rate", "dtype", "remat", "seed"),
)
BALANCE_LOSS_WEIGHT, Z_LOSS_WEIGHT = 0.01, 0.001
NORM_EPSILON = 1e-5
# The published 0.02 at the published hidden size.
INIT_STDDEV = 0.02 * 2048**0.5
STEPS_PER_LOG = 20
VALIDATION_BATCHES = 4
CHECKPOINTS_KEPT = 3
# Processes compile and write checkpoints at their own pace.
TIMEOUT_S = 300
LOAD_DECAY = 0.9


# ---- The model ----


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; queries and keys are normalised, over all heads together."""

    def __init__(self, hidden: int, heads: int, *, dtype, kernel_init, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
        self.heads = heads
        self.query, self.key, self.value, self.out = (linear(hidden, hidden) for _ in range(4))
        self.query_norm, self.key_norm = (rms_norm(hidden, dtype, rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [batch, length, H] -> the same."""
        by_head = (*x.shape[:2], self.heads, -1)
        q = train_moe_lm.rotate(self.query_norm(self.query(x)).reshape(by_head))
        k = train_moe_lm.rotate(self.key_norm(self.key(x)).reshape(by_head))
        y = jax.nn.dot_product_attention(q, k, self.value(x).reshape(by_head), is_causal=True)
        return self.out(y.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then a mixture of experts."""

    def __init__(self, comm: jax_ep.MoECommunicator, args: argparse.Namespace, *, kernel_init, rngs: nnx.Rngs):
        hidden, dtype = args.hidden, comm.config.dtype
        self.attention_norm = rms_norm(hidden, dtype, rngs)
        self.attention = Attention(hidden, args.heads, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
        self.moe_norm = rms_norm(hidden, dtype, rngs)
        # The published router leaves its weights as the softmax of all experts gives them.
        router = Router(
            hidden,
            args.experts,
            args.topk,
            normalize_weights=False,
            selection_bias=args.bias_rate > 0,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.moe = MoE(router, args.inner, communicator=comm, data_axes="data", kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, MoEAux]:
        x = x + self.attention(self.attention_norm(x))
        y, aux = self.moe(self.moe_norm(x))
        return x + y, aux


def rms_norm(size: int, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)


class LanguageModel(nnx.Module):
    """Bytes [batch, length] -> logits of the byte after each [batch, length, vocabulary], and all layers' aux."""

    def __init__(self, comm: jax_ep.MoECommunicator, args: argparse.Namespace, *, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(INIT_STDDEV / args.hidden**0.5, lower=-3, upper=3)
        dtype = comm.config.dtype
        self.remat = args.remat
        self.embed = nnx.Embed(args.vocabulary, args.hidden, dtype=dtype, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List(Block(comm, args, kernel_init=init, rngs=rngs) for _ in range(args.layers))
        self.norm = rms_norm(args.hidden, dtype, rngs)
        self.head = nnx.Linear(args.hidden, args.vocabulary, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

    def __call__(self, text: jax.Array) -> tuple[jax.Array, MoEAux]:
        x, aux = self.embed(text), []
        call = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for block in self.blocks:
            x, block_aux = call(block, x)
            aux.append(block_aux)
        return self.head(self.norm(x)).astype(jnp.float32), jax.tree.map(lambda *layers: jnp.stack(layers), *aux)


# ---- Training ----


def loss_of(model: LanguageModel, batch: jax.Array) -> tuple[jax.Array, tuple[jax.Array, MoEAux]]:
    """What training minimises; and the loss in nats per byte, and the aux. `batch` uint8 [batch, seq_len + 1]."""
    logits, aux = model(batch[:, :-1].astype(jnp.int32))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:].astype(jnp.int32)).mean()
    auxiliary = BALANCE_LOSS_WEIGHT * aux.balance_loss.mean() + Z_LOSS_WEIGHT * aux.z_loss.mean()
    return loss + auxiliary, (loss, aux)


def optimizer_of(args: argparse.Namespace) -> optax.GradientTransformation:
    peak = args.learning_rate
    rate = optax.warmup_cosine_decay_schedule(0, peak, args.warmup, args.steps, end_value=peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1))


class Trainer:
    """A model with its optimizer: `start` or `restore`, then `train_step`.

    `model` and `optimizer` have no arrays before one of the first two.
    """

    def __init__(self, comm: jax_ep.MoECommunicator, args: argparse.Namespace):
        self.comm, self.batch_sharding = comm, NamedSharding(comm.mesh, P(("data", "ep")))
        self._args = args
        self.model, self.optimizer = nnx.eval_shape(self._create)
        self._shardings = [nnx.get_named_sharding(nnx.state(part), comm.mesh) for part in (self.model, self.optimizer)]
        model, optimizer = map(nnx.StateSharding, self._shardings)
        replicated = NamedSharding(comm.mesh, P())
        # The shardings are pinned, so that each step is the same program, whatever its arguments come from.
        jit = functools.partial(nnx.jit, out_shardings=replicated)
        self._train_step = jit(
            self._update, in_shardings=(model, optimizer, self.batch_sharding), donate_argnums=(0, 1)
        )
        self._loss = jit(lambda model, batch: loss_of(model, batch)[1][0], in_shardings=(model, self.batch_sharding))
        self._start = nnx.jit(self._create, out_shardings=(model, optimizer))
        self._fingerprint = jax.jit(fingerprint, out_shardings=replicated)

    def _create(self) -> tuple[LanguageModel, nnx.Optimizer]:
        model = LanguageModel(self.comm, self._args, rngs=nnx.Rngs(self._args.seed))
        return model, nnx.Optimizer(model, optimizer_of(self._args), wrt=nnx.Param)

    def _update(self, model: LanguageModel, optimizer: nnx.Optimizer, batch: jax.Array):
        (_, seen), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model, batch)
        optimizer.update(model, gradients)
        if self._args.bias_rate > 0:
            for block, load in zip(model.blocks, seen[1].load, strict=True):
                block.moe.router.update_bias(load, self._args.bias_rate)
        return seen

    def start(self) -> None:
        self.model, self.optimizer = self._start()

    def train_step(self, batch: jax.Array) -> tuple[np.ndarray, MoEAux]:
        # Waits for the step: launches that queue up can hang XLA's collectives on CPU.
        return jax.device_get(self._train_step(self.model, self.optimizer, batch))

    def validation_loss(self, batches: list[jax.Array]) -> float:
        return float(np.mean([float(self._loss(self.model, batch)) for batch in batches]))

    def state(self) -> dict:
        """Parameters, router biases, and the optimizer's state, its step included."""
        parts = dict(model=self.model, optimizer=self.optimizer)
        return {name: nnx.to_pure_dict(nnx.state(part)) for name, part in parts.items()}

    def abstract_state(self) -> dict:
        """`state`, as shapes, dtypes and shardings."""
        shardings = dict(zip(("model", "optimizer"), map(nnx.to_pure_dict, self._shardings), strict=True))
        return jax.tree.map(
            lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
            self.state(),
            shardings,
        )

    def restore(self, state: dict) -> None:
        for part, values in ((self.model, state["model"]), (self.optimizer, state["optimizer"])):
            restored = nnx.state(part)
            nnx.replace_by_pure_dict(restored, values)
            nnx.update(part, restored)

    def fingerprint(self) -> str:
        return f"{int(self._fingerprint(self.state())):08x}"


def fingerprint(state) -> jax.Array:
    """uint32: the same for the same bits, however they are sharded; another one if any one element differs."""

    def of_array(array):
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
        index = jnp.zeros(array.shape, jnp.uint32)
        for dimension in range(array.ndim):
            index = index * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dimension)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    total = jnp.uint32(0)
    for array in jax.tree.leaves(state):
        total = total * jnp.uint32(0x85EBCA6B) + of_array(array)
    return total


# ---- Checkpoints ----


class Resumed(NamedTuple):
    """Where to go on, and what was seen before."""

    step: int
    history: History


class Checkpoints:
    """A few of a run's latest states, in a directory that belongs to this run.

    A checkpoint is orbax's item `state`, and `run`, in JSON: the settings, the history, and the position in the data,
    which is the text, the seed, and the number of the next batch.
    """

    def __init__(self, directory: pathlib.Path, args: argparse.Namespace, text: Text):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(CHECKPOINTS_KEPT), enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._settings = {name: getattr(args, name) for name in SETTINGS}
        self._text = text

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, trainer: Trainer, history: History) -> None:
        """Returns as soon as the state is copied; the next call waits until it is written."""
        run = dict(
            settings=self._settings,
            data=dict(sha256=self._text.sha256, seed=self._settings["seed"], next_batch=step + 1),
            fingerprint=trainer.fingerprint(),
            history=dataclasses.asdict(history),
        )
        items = ocp.args.Composite(state=ocp.args.StandardSave(trainer.state()), run=ocp.args.JsonSave(run))
        self._manager.save(step, args=items, force=True)

    def restore(self, trainer: Trainer) -> Resumed:
        """The latest checkpoint, onto the trainer's devices. Exits if it is of another run, or was damaged."""
        step = self.latest_step()
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        for name, saved in run["settings"].items():
            if saved != self._settings[name]:
                flag = "--" + name.replace("_", "-")
                sys.exit(f"{flag}: expected {saved}, as in the checkpoint, got {self._settings[name]}")
        if run["data"]["sha256"] != self._text.sha256:
            sys.exit(f"--text: expected the text of the checkpoint, got {self._text.name}, which differs from it")
        abstract = ocp.args.StandardRestore(trainer.abstract_state())
        trainer.restore(self._manager.restore(step, args=ocp.args.Composite(state=abstract)).state)
        if trainer.fingerprint() != run["fingerprint"]:
            sys.exit(f"--resume: the state of step {step} is not what was saved: expected {run['fingerprint']}")
        return Resumed(run["data"]["next_batch"] - 1, History(**run["history"]))

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.close()


# ---- What one sees ----


@dataclasses.dataclass
class History:
    """What training saw, by step: in JSON, so that a resumed run shows all of it.

    The losses are in nats per byte. `imbalance` is the busiest expert's load over the mean, of all layers the mean;
    `dropped` a share of all (token, k). `load` is each layer's [E], as shares, lately.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    imbalance: list[float] = dataclasses.field(default_factory=list)
    dropped: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    load: list[list[float]] | None = None

    def add(self, loss: np.ndarray, aux: MoEAux, routed: int) -> None:
        """`routed`: (token, k) per layer and step."""
        self.losses.append(float(loss))
        self.imbalance.append(float(aux.load.max(-1).mean() * aux.load.shape[-1]))
        self.dropped.append(float(aux.num_dropped.sum() / (routed * aux.num_dropped.size)))
        load = aux.load.astype(np.float64)
        self.load = (load if self.load is None else LOAD_DECAY * np.array(self.load) + (1 - LOAD_DECAY) * load).tolist()

    def row(self, entropy: float, tokens_per_second: float) -> str:
        """Of the table: the latest interval."""
        step, validation = self.validation[-1]
        start = (step - 1) // STEPS_PER_LOG * STEPS_PER_LOG
        loss, imbalance, dropped = (np.mean(seen[start:]) for seen in (self.losses, self.imbalance, self.dropped))
        return (
            f"{step:6} {loss:9.4f} {validation:11.4f} {entropy:9.4f} {imbalance:8.2f} x {dropped:8.1%} "
            f"{tokens_per_second:10,.0f}"
        )


TABLE_HEAD = (
    f"{'step':>6} {'loss':>9} {'validation':>11} {'unigram':>9} {'busiest':>10} {'dropped':>8} {'tokens/s':>10}"
)


def plot(history: History, entropy: float, output: pathlib.Path) -> None:
    """Loss, balance of the load, and the load of each layer's experts."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    losses, balance, load = figure.subplots(1, 3)
    steps = range(1, len(history.losses) + 1)
    losses.plot(steps, history.losses, color="C0", alpha=0.5, label="training")
    losses.plot(*zip(*history.validation, strict=True), "o-", color="C0", label="validation")
    losses.axhline(entropy, color="C3", linestyle="--", label="unigram entropy")
    losses.set(xlabel="step", ylabel="loss [nats/byte]", title="Loss", ylim=(0, None))
    balance.plot(steps, history.imbalance, color="C2", label="busiest expert over the mean")
    balance.axhline(1, color="black", linewidth=0.8, linestyle=":", label="balanced")
    balance.set(xlabel="step", title="Load", ylim=(0, None))
    share = balance.twinx()
    share.plot(steps, 100 * np.array(history.dropped), color="C3", alpha=0.6, label="dropped [%], on the right")
    share.set(ylim=(0, max(1, 110 * max(history.dropped))))
    losses.legend()
    balance.legend(handles=[*balance.lines, *share.lines])
    relative = np.array(history.load) * len(history.load[0])
    image = load.imshow(relative, aspect="auto", interpolation="nearest", vmin=0)
    load.set(xlabel="expert", ylabel="layer", yticks=range(len(relative)), title="Load of experts, over the mean")
    figure.colorbar(image, ax=load)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


# ---- The run ----


def train(trainer: Trainer, text: Text, checkpoints: Checkpoints | None, resumed: Resumed, args, say) -> History:
    """Up to `--stop-after`, or to the end."""
    first, history, last = resumed.step + 1, resumed.history, args.stop_after or args.steps
    tokens = args.batch * args.seq_len
    validation = text.validation_batches(VALIDATION_BATCHES)
    seconds, timed_steps = 0.0, 0
    say(TABLE_HEAD)
    is_quiet = jax.process_index() > 0
    bar = tqdm(range(first, last + 1), "training", unit="step", initial=first - 1, total=last, disable=is_quiet)
    for step in bar:
        start = time.perf_counter()
        history.add(*trainer.train_step(text.training_batch(step)), tokens * args.topk)
        if step > first:  # which was compiled
            seconds, timed_steps = seconds + time.perf_counter() - start, timed_steps + 1
        if not math.isfinite(history.losses[-1]):
            trainer.comm.check()
            sys.exit(f"The loss of step {step} is {history.losses[-1]}.")
        if step % STEPS_PER_LOG == 0 or step == args.steps:
            history.validation.append((step, trainer.validation_loss(validation)))
            say(history.row(text.entropy, timed_steps * tokens / seconds if seconds else math.nan))
            seconds, timed_steps = 0.0, 0
        if checkpoints is not None and (step % args.save_every == 0 or step == last):
            trainer.comm.check()
            checkpoints.save(step, trainer, history)
    trainer.comm.check()
    return history


# ---- The command ----


def parse_arguments(argv=None) -> argparse.Namespace:
    description, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny", help="what the flags up to --steps are by default; default: tiny")
    add("--hidden", type=int, help="elements per token")
    add("--layers", type=int, help="blocks of attention and experts")
    add("--heads", type=int, help="attention heads, all together --hidden elements wide")
    add("--inner", type=int, help="intermediate elements of an expert")
    add("--seq-len", type=int, help="bytes per sequence")
    add("--batch", type=int, help="sequences per step, over all devices")
    add("--learning-rate", type=float, help="at its peak")
    add("--steps", type=int, help="of the whole schedule")
    add("--experts", type=int, default=64, help="experts per layer, over all devices; default: 64")
    add(
        "--vocabulary", type=int, default=NUM_BYTES, help=f"rows of embedding and head; default: {NUM_BYTES}, the bytes"
    )
    add("--topk", type=int, default=8, help="experts per token; default: 8")
    add("--warmup", type=int, help="steps until the peak of the learning rate; default: a tenth of --steps")
    add("--bias-rate", type=float, default=0.0, help="of router biases, which balance the load besides; default: none")
    add(
        "--capacity-factor",
        type=float,
        default=2.0,
        help="rows that a device has room for, over those of a balanced load; nothing is dropped, as in OLMoE, "
        "with as many as there are devices along the experts; default: 2",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations; parameters are float32")
    add("--remat", action="store_true", help="the backward pass computes blocks again, to save memory")
    add("--text", type=pathlib.Path, help="a file to learn; default: Python's language reference, as help() shows it")
    add("--seed", type=int, default=0, help="of parameters and batches; default: 0")
    add("--checkpoint", metavar="DIR", type=pathlib.Path, help=f"where the latest {CHECKPOINTS_KEPT} checkpoints are")
    add("--save-every", type=int, default=100, help="steps between checkpoints; the last is saved too; default: 100")
    add("--resume", action="store_true", help="goes on from the latest checkpoint")
    add("--stop-after", metavar="STEP", type=int, help="ends there, in the middle of the schedule")
    add("--data", type=int, default=1, help="groups of devices that each have all experts; default: 1")
    add("--devices", type=int, help="of one process; default: all GPUs, or 8 virtual CPU devices")
    add("--implementation", choices=("cuda", "cpu", "reference"), help="of jax_ep; default: by the devices")
    add(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="GPUs add up in a fixed order, without which resuming is not exact there",
    )
    add("--output", type=pathlib.Path, default=pathlib.Path("out/olmoe.png"), help="the plot; default: out/olmoe.png")
    train_moe_lm.add_process_arguments(parser)
    args = parser.parse_args(argv)
    for name, value in SIZES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.warmup = args.steps // 10 if args.warmup is None else args.warmup
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in (
        "hidden",
        "layers",
        "heads",
        "inner",
        "seq_len",
        "batch",
        "steps",
        "experts",
        "topk",
        "save_every",
        "data",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.hidden % (2 * args.heads):
        parser.error(f"--hidden: expected a multiple of {2 * args.heads}, twice the heads, got {args.hidden}")
    if args.vocabulary < NUM_BYTES:
        parser.error(f"--vocabulary: expected at least the {NUM_BYTES} bytes, got {args.vocabulary}")
    if not 0 <= args.warmup < args.steps:
        parser.error(f"--warmup: expected less than the {args.steps} steps, got {args.warmup}")
    if args.stop_after is not None and not 0 < args.stop_after <= args.steps:
        parser.error(f"--stop-after: expected one of the {args.steps} steps, got {args.stop_after}")
    if not args.capacity_factor > 0:
        parser.error(f"--capacity-factor: expected more than 0, got {args.capacity_factor}")
    if args.devices is not None and args.num_processes > 1:
        parser.error(f"--devices: expected none with {args.num_processes} processes, got {args.devices}")
    if args.resume and args.checkpoint is None:
        parser.error("--resume: expected --checkpoint besides, got none")


def make_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    """All devices of all processes, or the first `--devices`, along "data" and "ep"."""
    if args.deterministic:
        # Before devices are looked for. Of no effect on CPUs, which always do.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    train_moe_lm.start_jax(args, args.devices or train_moe_lm.NUM_VIRTUAL_CPU_DEVICES)
    devices = jax.devices()
    if args.devices is not None and not 0 < args.devices <= len(devices):
        sys.exit(f"--devices: expected 1 to {len(devices)}, got {args.devices}")
    devices = devices[: args.devices]
    if len(devices) % args.data:
        sys.exit(f"--data: expected a divisor of the {len(devices)} devices, got {args.data}")
    if args.batch % len(devices):
        sys.exit(f"--batch: expected a multiple of the {len(devices)} devices, got {args.batch}")
    shape = args.data, len(devices) // args.data
    return jax.make_mesh(shape, ("data", "ep"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_communicator(mesh: jax.sharding.Mesh, args: argparse.Namespace) -> jax_ep.MoECommunicator:
    tokens = args.batch // mesh.size * args.seq_len
    # More than all tokens of all ranks cannot come.
    factor = min(args.capacity_factor, mesh.shape["ep"])
    return jax_ep.MoECommunicator(
        mesh,
        num_experts=args.experts,
        hidden_size=args.hidden,
        topk=args.topk,
        max_tokens_per_rank=tokens,
        max_recv_tokens_per_rank=math.ceil(factor * tokens * args.topk),
        overflow="drop",
        dtype=args.dtype,
        implementation=args.implementation,
        timeout_s=TIMEOUT_S,
    )


def open_checkpoints(args: argparse.Namespace, text: Text) -> Checkpoints | None:
    if args.checkpoint is None:
        return None
    checkpoints = Checkpoints(args.checkpoint, args, text)
    latest = checkpoints.latest_step()
    if args.resume and latest is None:
        sys.exit(f"--resume: expected a checkpoint in {args.checkpoint}, got none")
    if not args.resume and latest is not None:
        sys.exit(f"--checkpoint: expected --resume or another directory, since {args.checkpoint} has step {latest}")
    return checkpoints


def describe(trainer: Trainer, args: argparse.Namespace) -> str:
    comm, parameters = trainer.comm, nnx.state(trainer.model, nnx.Param)
    total = sum(math.prod(array.shape) for array in jax.tree.leaves(parameters))
    unused = args.layers * (args.experts - args.topk) * 3 * args.hidden * args.inner
    mesh = " x ".join(f"{size} {name!r}" for name, size in comm.mesh.shape.items())
    return (
        f"{total:,} parameters, {total - unused:,} of them per token: {args.layers} layers of {args.experts} experts, "
        f"top {args.topk}, {args.dtype}; {mesh} {comm.mesh.devices.flat[0].platform} devices with "
        f"{comm.num_local_experts} experts and room for {comm.capacity} rows each, "
        f"implementation {comm.config.implementation}"
    )


def run(args: argparse.Namespace) -> None:
    mesh = make_mesh(args)
    say = tqdm.write if jax.process_index() == 0 else lambda _: None
    with make_communicator(mesh, args) as comm:
        trainer = Trainer(comm, args)
        text = Text(trainer.batch_sharding, batch=args.batch, seq_len=args.seq_len, seed=args.seed, file=args.text)
        say(f"{text.num_bytes:,} bytes of {text.name}, unigram entropy {text.entropy:.4f} nats/byte")
        say(describe(trainer, args))
        checkpoints = open_checkpoints(args, text)
        try:
            if args.resume:
                resumed = checkpoints.restore(trainer)
                say(f"Resumed after step {resumed.step}: state {trainer.fingerprint()}, as it was saved")
            else:
                trainer.start()
                resumed = Resumed(0, History())
            history = train(trainer, text, checkpoints, resumed, args, say)
            say(f"State after step {len(history.losses)}: {trainer.fingerprint()}")
        finally:
            if checkpoints is not None:
                checkpoints.close()
    load = np.array(history.load) * args.batch * args.seq_len * args.topk
    say(train_moe_lm.load_table(load))
    if jax.process_index() == 0:
        plot(history, text.entropy, args.output)
    say(f"Plot in {args.output}")


def main(argv=None) -> None:
    run(parse_arguments(argv))


if __name__ == "__main__":
    main()
