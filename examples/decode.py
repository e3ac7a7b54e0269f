"""Writes text byte by byte with a small mixture-of-experts language model, in jax_ep's low-latency mode.

    python examples/decode.py            # on all GPUs, or on 8 virtual CPU devices where there is none
    python examples/decode.py --help

The model is that of train_moe_lm.py, trained for half a minute, which is enough for some words. Then
the prompts are split over the devices, and each takes the likeliest byte at every step.

What it shows:

- `expert_layer`: `dispatch` in `MoEMode.LOW_LATENCY`, matrix products over the slots of all experts, and `combine`.
- `Decoder`: the loop over all steps in one jitted program, with a cache of keys and values.
- `compare`: the text against what `implementation="reference"` writes, which is the same with stock JAX collectives.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import train_moe_lm
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from text import printable

import jax_ep

NUM_VIRTUAL_CPU_DEVICES = 8
PROMPTS = (b"The expression ", b"If the ", b"A class ", b"The value ", b"An object ", b"In the ", b"It is ", b"For a ")
UNWRITTEN = -1
REPEATS = 3
# Implementations round sums differently. Where they part, the two likeliest bytes must have been this close (in nats):
# a quantised element that falls on the other side of a tie is off by a sixteenth.
TIE = 0.01
FP8_TIE = 0.2


def expert_layer(comm: jax_ep.MoECommunicator, moe: train_moe_lm.MoE, x: jax.Array, *, fp8: bool) -> jax.Array:
    """`x` [tokens, H], split over "ep" -> the same, through the experts of a trained layer."""

    @jax.shard_map(mesh=comm.mesh, in_specs=(P("ep"), P(), P("ep"), P("ep")), out_specs=P("ep"))
    def on_each_rank(x, router, gate_up, down):
        probabilities = jax.nn.softmax(x.astype(jnp.float32) @ router)
        weights, topk_ids = jax.lax.top_k(probabilities, comm.config.topk)
        quant = jax_ep.QuantConfig() if fp8 else None
        out, handle = comm.dispatch(x, topk_ids, weights / weights.sum(-1, keepdims=True), quant=quant)
        tokens = jax_ep.dequantize(out, x.dtype) if fp8 else out.tokens
        return comm.combine(swiglu(tokens, gate_up.astype(x.dtype), down.astype(x.dtype)), handle)

    return on_each_rank(x, moe.router[...], moe.gate_up[...], moe.down[...])


def swiglu(tokens: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """Each expert's feed-forward network, for its slots of `tokens` [L, S, H].

    Slots without a token hold anything, NaN included. That is harmless, since a row of these products depends on that
    row of the tokens alone, and `combine` does not read what comes of the others. A sum or a maximum over slots would
    have to leave them out: only the first `num_tokens_per_expert` slots of each expert count.
    """
    gate, up = jnp.split(jnp.einsum("lsh,lhf->lsf", tokens, gate_up), 2, axis=-1)
    return jnp.einsum("lsf,lfh->lsh", jax.nn.silu(gate) * up, down)


def attend(attention: train_moe_lm.Attention, x: jax.Array, cache, position: jax.Array):
    """The attention of `x` [batch, H] at `position` to all up to there -> the same, and the cache with this position.

    The cache is keys and values [batch, length, heads, HEAD_SIZE].
    """
    batch, hidden = x.shape
    q, k, v = jnp.split(attention.qkv(x).reshape(batch, 1, -1, train_moe_lm.HEAD_SIZE), 3, axis=2)
    new = train_moe_lm.rotate(k, position), v
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(*pair, position, axis=1) for pair in zip(cache, new, strict=True)
    )
    seen = jnp.arange(keys.shape[1]) <= position
    y = jax.nn.dot_product_attention(train_moe_lm.rotate(q, position), keys, values, mask=seen[None, None, None])
    return attention.out(y.reshape(batch, hidden)), (keys, values)


class Decoder:
    """`decode(state, text)` in one program: writes where `text` int32 [batch, length] is UNWRITTEN, behind the prompts.

    Returns the text, and how many nats the likeliest byte was ahead of the second at each place.
    """

    def __init__(self, trainer: train_moe_lm.Trainer, comm: jax_ep.MoECommunicator, *, fp8: bool):
        self.comm = comm
        self._graph, self._fp8 = trainer.graph, fp8
        self._sharding = NamedSharding(comm.mesh, P("ep"))
        self.decode = jax.jit(self._decode, out_shardings=self._sharding)

    def _decode(self, state, text):
        model, _ = nnx.merge(self._graph, state)

        def step(carry, position):
            byte, caches = carry
            logits, caches = self._logits(model, byte, caches, position)
            likeliest, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
            given = jax.lax.dynamic_index_in_dim(text, position + 1, axis=1, keepdims=False)
            byte = jnp.where(given == UNWRITTEN, jnp.argmax(logits, axis=-1), given)
            return (byte, caches), (byte, likeliest - second)

        first = text[:, 0]
        _, (rest, margins) = jax.lax.scan(step, (first, self._empty_caches(model, text)), jnp.arange(text.shape[1] - 1))
        return jnp.column_stack([first, rest.T]), jnp.column_stack([jnp.zeros(first.shape), margins.T])

    def _logits(self, model: train_moe_lm.LanguageModel, byte, caches, position):
        """Of the byte behind `byte` [batch], which stands at `position`."""
        x, new_caches = model.embed(byte), []
        for block, cache in zip(model.blocks, caches, strict=True):
            y, cache = attend(block.attention, block.attention_norm(x), cache, position)
            x += y
            x += expert_layer(self.comm, block.moe, block.moe_norm(x), fp8=self._fp8)
            new_caches.append(cache)
        return model.head(model.norm(x)).astype(jnp.float32), new_caches

    def _empty_caches(self, model, text):
        heads = self.comm.config.hidden_size // train_moe_lm.HEAD_SIZE
        zeros = jnp.zeros((*text.shape, heads, train_moe_lm.HEAD_SIZE), self.comm.config.dtype)
        zeros = jax.lax.with_sharding_constraint(zeros, self._sharding)
        return [(zeros, zeros) for _ in model.blocks]

    def put(self, text: np.ndarray) -> jax.Array:
        return jax.device_put(text, self._sharding)


def prompts(args: argparse.Namespace) -> np.ndarray:
    """`[batch, length]`, UNWRITTEN after each prompt."""
    text = np.full((args.batch, max(map(len, PROMPTS)) + args.steps), UNWRITTEN, np.int32)
    for i, row in enumerate(text):
        prompt = PROMPTS[i % len(PROMPTS)]
        row[: len(prompt)] = np.frombuffer(prompt, np.uint8)
    return text


def compare(text: np.ndarray, margins: np.ndarray, expected: np.ndarray, tie: float) -> str:
    """Exits unless the two are the same, up to where both could have gone on either way."""
    differs = text != expected
    rows = np.flatnonzero(differs.any(1))
    if rows.size == 0:
        return "The text is the reference implementation's, byte for byte."
    places = differs[rows].argmax(1)
    largest = margins[rows, places].max()
    report = f"{rows.size} of {len(text)} texts part from the reference's, at margins of up to {largest:.1e} nats"
    if not largest <= tie:
        sys.exit(f"The text is not the reference implementation's: {report}.")
    return f"The text is the reference implementation's, up to ties: {report}."


# ---- The command ----


def parse_arguments(argv=None) -> argparse.Namespace:
    description, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=80, help="bytes to write behind the longest prompt")
    add("--batch", type=int, default=8, help="prompts, over all devices")
    add("--train-steps", type=int, default=160, help="steps that the model is trained for first")
    add("--devices", type=int, help=f"None: all GPUs, or {NUM_VIRTUAL_CPU_DEVICES} virtual CPU devices")
    add("--implementation", choices=("cuda", "cpu", "reference"), help="of jax_ep; None: by the devices")
    add("--fp8", action="store_true", help="tokens travel to their experts quantised to float8_e4m3fn")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with the reference's text")
    add("--seed", type=int, default=0, help="of parameters and training batches")
    return parser.parse_args(argv)


def make_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Of no effect on GPUs.
        jax.config.update("jax_num_cpu_devices", args.devices or NUM_VIRTUAL_CPU_DEVICES)
    devices = jax.devices()[: args.devices]
    if args.batch % len(devices):
        sys.exit(f"--batch: expected a multiple of the {len(devices)} devices, got {args.batch}")
    return jax.make_mesh((len(devices),), ("ep",), axis_types=(AxisType.Auto,), devices=devices)


def train(mesh: jax.sharding.Mesh, args: argparse.Namespace):
    """The trainer, which knows the model; its state; its sizes."""
    # A schedule of no steps there is not.
    options = ("--steps", max(1, args.train_steps), "--seed", args.seed, "--seq-len", 64)
    sizes = train_moe_lm.parse_arguments(map(str, options))
    text = train_moe_lm.open_text(mesh, sizes)
    with train_moe_lm.make_communicator(mesh, sizes, args.implementation) as comm:
        trainer, start = train_moe_lm.Trainer(comm, sizes), time.perf_counter()
        state, history = train_moe_lm.train(trainer, text, args.train_steps, lambda _: None)
    if args.train_steps:
        seconds, loss = time.perf_counter() - start, history.validation[args.train_steps]
        print(
            f"Trained for {args.train_steps} steps in {seconds:.0f} s: validation loss {loss:.2f} nats/byte, "
            f"unigram entropy {text.entropy:.2f}"
        )
    return trainer, state, sizes


def make_communicator(mesh, sizes: argparse.Namespace, args: argparse.Namespace, implementation: str | None):
    return jax_ep.MoECommunicator(
        mesh,
        num_experts=sizes.experts,
        hidden_size=sizes.hidden,
        topk=sizes.topk,
        max_tokens_per_rank=args.batch // mesh.size,
        mode=jax_ep.MoEMode.LOW_LATENCY,
        dtype=sizes.dtype,
        implementation=implementation,
    )


def write(decoder: Decoder, state, text: jax.Array) -> tuple[np.ndarray, np.ndarray, float]:
    """The text, the margins, and the median seconds of a run, once compiled."""
    written = jax.block_until_ready(decoder.decode(state, text))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(decoder.decode(state, text))
        seconds.append(time.perf_counter() - start)
    decoder.comm.check()
    return *jax.device_get(written), statistics.median(seconds)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    mesh = make_mesh(args)
    trainer, state, sizes = train(mesh, args)
    make = functools.partial(make_communicator, mesh, sizes, args)
    with make(args.implementation) as comm:
        decoder = Decoder(trainer, comm, fp8=args.fp8)
        text = decoder.put(prompts(args))
        written, margins, seconds = write(decoder, state, text)
        for before, line in zip(prompts(args), written, strict=True):
            length = (before != UNWRITTEN).sum()
            print(f"---\n{printable(line[:length])}|{printable(line[length:])}")
        steps = text.shape[1] - 1
        print(
            f"---\n{args.batch * steps / seconds:,.0f} tokens/s, {seconds / steps * 1e3:.2f} ms a step: {args.batch} "
            f"prompts, {sizes.layers} layers of {sizes.experts} experts, top {sizes.topk}, on {mesh.size} "
            f"{mesh.devices.flat[0].platform} devices, implementation {comm.config.implementation}"
            f"{', dispatch in fp8' if args.fp8 else ''}; median of {REPEATS} runs"
        )
    if args.check:
        with make("reference") as reference:
            expected, _, seconds = write(Decoder(trainer, reference, fp8=args.fp8), state, text)
        print(compare(written, margins, expected, FP8_TIE if args.fp8 else TIE))


if __name__ == "__main__":
    main()
