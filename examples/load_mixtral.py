"""Loads the mixture-of-experts block of a Mixtral checkpoint, split over devices by expert, and runs it.

    python examples/load_mixtral.py              # a tiny checkpoint of its own; all GPUs, or 8 virtual CPU devices
    python examples/load_mixtral.py --checkpoint Mixtral-8x7B-v0.1/ --layer 3
    python examples/load_mixtral.py --checkpoint model-00001-of-00019.safetensors model-00002-of-00019.safetensors
    python examples/load_mixtral.py --help

Checkpoints are safetensors files as Hugging Face has them: a folder, with or without an index, or the files that
hold the layer.

What it shows:

- `load_layer`: a `jax_ep.nn.MoE` whose kernels come from the files. For each device the slices of its own experts are
  read, and nothing else.
- `numpy_block`, and `transformers_block` where torch and transformers are installed: the outputs are theirs, or the
  script fails.
- `compare_routing`: what it changes if the router computes in bfloat16.

Mixtral takes the softmax over all experts, the best K of it, and divides these by their sum. That is
`Router(score="softmax", normalize_weights=True)`, the default; it is the same as the softmax over the K best logits.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import save_file

import jax_ep
from jax_ep.nn import MoE, Router

NUM_VIRTUAL_CPU_DEVICES = 8
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DEFAULT_TOPK = 2
# MoE's kernels are [E, in, out]. The checkpoint has each expert's by itself, and [out, in].
LINEARS = {"gate": "w1", "up": "w3", "down": "w2"}
# How far outputs may be from float32 on one device, relative to the largest. GPUs add up in another order, and some
# of their exponentials differ.
TOLERANCE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}
GPU_TOLERANCE = TOLERANCE | {"float32": 2e-3}


# ---- The checkpoint ----


class Checkpoint:
    """The tensors of some safetensors files. Files are opened when first needed, and only what is asked for is read.

    Args:
      paths: one folder, with `model.safetensors.index.json` or without; or files.

    Attributes:
      num_bytes_read: of tensors, up to now.
    """

    def __init__(self, paths: Iterable[str | os.PathLike]):
        paths, self._open_files = [pathlib.Path(path) for path in paths], {}
        folder = paths[0] if paths[0].is_dir() else paths[0].parent
        index, config = folder / "model.safetensors.index.json", folder / "config.json"
        if paths[0].is_dir() and index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            self._files = {name: folder / file for name, file in weight_map.items()}
        else:
            files = sorted(folder.glob("*.safetensors")) if paths[0].is_dir() else paths
            self._files = {name: file for file in files for name in self._open(file).keys()}
        if not self._files:
            sys.exit(f"--checkpoint: expected safetensors files, got none in {folder}")
        self.config = json.loads(config.read_text()) if config.exists() else {}
        self.num_bytes_read = 0

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def slice_of(self, name: str):
        """What can be sliced, and knows its shape and dtype."""
        if name not in self._files:
            sys.exit(f"--checkpoint: expected {name} in the files, got none of that name")
        return self._open(self._files[name]).get_slice(name)

    def read(self, name: str, *index: slice) -> np.ndarray:
        part = self.slice_of(name)[index or slice(None)]
        self.num_bytes_read += part.nbytes
        return part

    def _open(self, path: pathlib.Path):
        if path not in self._open_files:
            if not path.is_file():
                sys.exit(f"--checkpoint: expected a safetensors file {path}, got none")
            self._open_files[path] = safe_open(path, "numpy")  # reads the header
        return self._open_files[path]


@dataclasses.dataclass(frozen=True)
class Block:
    """A layer's mixture of experts in a checkpoint."""

    prefix: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    topk: int
    dtype: str

    @classmethod
    def find(cls, checkpoint: Checkpoint, layer: int, topk: int | None = None) -> Block:
        """Sizes are those of the tensors; `topk` by default that of config.json."""
        prefix = f"model.layers.{layer}.block_sparse_moe"
        if f"{prefix}.gate.weight" not in checkpoint.names():
            pattern = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight")
            layers = sorted(int(match[1]) for match in map(pattern.fullmatch, checkpoint.names()) if match)
            sys.exit(f"--layer: expected one of the layers {layers} in the files, got {layer}")
        activation = checkpoint.config.get("hidden_act", "silu")
        if activation != "silu":
            sys.exit(f"--checkpoint: expected hidden_act silu, got {activation}")
        num_experts, hidden = checkpoint.slice_of(f"{prefix}.gate.weight").get_shape()
        kernel = checkpoint.slice_of(f"{prefix}.experts.0.w1.weight")
        if kernel.get_dtype() not in DTYPES:
            sys.exit(f"--checkpoint: expected weights in {', '.join(DTYPES)}, got {kernel.get_dtype()}")
        topk = topk or checkpoint.config.get("num_experts_per_tok", DEFAULT_TOPK)
        return cls(prefix, hidden, kernel.get_shape()[0], num_experts, topk, DTYPES[kernel.get_dtype()])

    @property
    def gate(self) -> str:
        return f"{self.prefix}.gate.weight"

    def linear(self, expert: int, name: str) -> str:
        return f"{self.prefix}.experts.{expert}.{name}.weight"


def write_tiny_checkpoint(folder: pathlib.Path, *, dtype="float32", num_layers=2, seed=0) -> None:
    """A folder as Hugging Face has them: a file per layer, an index, a config. Of each layer, the block alone."""
    hidden, inner, num_experts = 64, 96, 8
    rng, weight_map = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)

    def draw(rows, columns):
        return (rng.normal(size=(rows, columns)) / np.sqrt(columns)).astype(dtype)

    for layer in range(num_layers):
        block = Block(f"model.layers.{layer}.block_sparse_moe", hidden, inner, num_experts, DEFAULT_TOPK, dtype)
        tensors = {block.gate: draw(num_experts, hidden)}
        for expert in range(num_experts):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                tensors[block.linear(expert, name)] = draw(*shape)
        file = f"model-{layer + 1:05}-of-{num_layers:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = dict(hidden_size=hidden, intermediate_size=inner, num_local_experts=num_experts)
    config |= dict(model_type="mixtral", num_experts_per_tok=DEFAULT_TOPK, num_hidden_layers=num_layers)
    (folder / "config.json").write_text(json.dumps(config | dict(hidden_act="silu")))


# ---- The layer ----


def read_kernel(checkpoint: Checkpoint, block: Block, name: str, index: tuple[slice, ...], dtype) -> np.ndarray:
    """The part `index` of all experts' kernel `[E, in, out]`."""
    experts, rows, columns = index
    tensors = (block.linear(expert, LINEARS[name]) for expert in range(block.num_experts)[experts])
    return np.stack([checkpoint.read(tensor, columns, rows).T.astype(dtype) for tensor in tensors])


def load_layer(checkpoint: Checkpoint, block: Block, comm: jax_ep.MoECommunicator) -> MoE:
    """The layer in the communicator's dtype, on its mesh. The router keeps the checkpoint's dtype."""
    dtype, mesh = comm.config.dtype, comm.mesh
    tensor_axis = "tp" if mesh.shape["tp"] > 1 else None

    def make():
        rngs = nnx.Rngs(0)
        router = Router(block.hidden_size, block.num_experts, block.topk, param_dtype=block.dtype, rngs=rngs)
        arguments = dict(communicator=comm, tensor_axis=tensor_axis, param_dtype=dtype, rngs=rngs)
        return MoE(router, block.intermediate_size, **arguments)

    layer = nnx.eval_shape(make)  # shapes and shardings; no kernel is drawn
    for name in LINEARS:
        kernel = getattr(layer, name)
        read = functools.partial(read_kernel, checkpoint, block, name, dtype=dtype)
        sharding = NamedSharding(mesh, P(*kernel.out_sharding))
        kernel.set_value(jax.make_array_from_callback(kernel.shape, sharding, read))
    gate = checkpoint.read(block.gate).T
    layer.router.kernel.set_value(jax.device_put(gate, NamedSharding(mesh, P())))
    return layer


@nnx.jit
def forward(layer: MoE, x: jax.Array):
    return layer(x)


def outputs_of(layer: MoE, x: np.ndarray) -> np.ndarray:
    """`x` [T, H] of any dtype -> float32 [T, H]."""
    comm = layer.communicator
    x = jax.device_put(x, NamedSharding(comm.mesh, P(layer.expert_axis)))
    with jax.default_matmul_precision("highest"):  # for float32 on GPUs, which would shorten mantissas
        y, _ = jax.block_until_ready(forward(layer, x))
    comm.check()
    return np.asarray(jax.device_get(y), np.float32)


# ---- The same on one device ----


def routing_weights(x: np.ndarray, gate: np.ndarray, topk: int, *, logits=np.float32, softmax=np.float32) -> np.ndarray:
    """float32 [T, E], 0 for experts that are not chosen; `logits` and `softmax` say what these are rounded to."""
    scores = (x @ gate.T).astype(logits).astype(np.float32)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores = (scores / scores.sum(-1, keepdims=True)).astype(softmax).astype(np.float32)
    weights = np.zeros_like(scores)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[:, :topk]
    np.put_along_axis(weights, chosen, np.take_along_axis(scores, chosen, -1), -1)
    return weights / weights.sum(-1, keepdims=True)


def numpy_block(checkpoint: Checkpoint, block: Block, x: np.ndarray) -> np.ndarray:
    """`x` float32 [T, H] -> the same, expert by expert, as the checkpoint has them."""

    def read(name):
        return checkpoint.read(name).astype(np.float32)

    weights, y = routing_weights(x, read(block.gate), block.topk), np.zeros_like(x)
    for expert in range(block.num_experts):
        tokens = np.flatnonzero(weights[:, expert])
        w1, w2, w3 = (read(block.linear(expert, name)) for name in ("w1", "w2", "w3"))
        hidden = x[tokens] @ w1.T
        hidden *= 0.5 * (1 + np.tanh(0.5 * hidden))  # SiLU
        y[tokens] += weights[tokens, expert, None] * ((hidden * (x[tokens] @ w3.T)) @ w2.T)
    return y


def transformers_module(checkpoint: Checkpoint, block: Block, dtype: str = "float32"):
    """The `MixtralSparseMoeBlock` of the transformers that is installed, with the checkpoint's weights."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = dict(hidden_size=block.hidden_size, intermediate_size=block.intermediate_size)
    sizes |= dict(num_local_experts=block.num_experts, num_experts_per_tok=block.topk)
    with torch.device("meta"):
        module = MixtralSparseMoeBlock(MixtralConfig(**sizes, experts_implementation="eager"))

    def read(name):
        return torch.from_numpy(checkpoint.read(name).astype(np.float32)).to(getattr(torch, dtype))

    def fused(*linears):
        experts = range(block.num_experts)
        return torch.stack([torch.cat([read(block.linear(expert, name)) for name in linears]) for expert in experts])

    # Up to 4.57 the module's parameters are named as in the checkpoint. Version 5 keeps all experts' in two tensors.
    version_5 = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}
    state = {
        name: fused(*version_5[name]) if name in version_5 else read(f"{block.prefix}.{name}")
        for name in module.state_dict()
    }
    module.load_state_dict(state, assign=True)
    return module.eval()


def transformers_block(checkpoint: Checkpoint, block: Block, x: np.ndarray) -> np.ndarray:
    """`x` float32 [T, H] -> the same, by PyTorch on the CPU."""
    import torch

    with torch.no_grad():
        y = transformers_module(checkpoint, block)(torch.from_numpy(x)[None])
    # Up to version 4 the router's logits come beside it.
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape).numpy()


# ---- What it prints ----


def compare(got: np.ndarray, wanted: np.ndarray, tolerance: float, whose: str) -> str:
    """Exits unless the outputs are the same to rounding."""
    difference = np.abs(got - wanted).max() / np.abs(wanted).max()
    if not difference <= tolerance:
        sys.exit(f"The outputs are not {whose}: {difference:.1e} of the largest apart, more than {tolerance:.0e}.")
    return f"The outputs are {whose}, to {difference:.1e} of the largest."


def compare_with_transformers(checkpoint, block: Block, x, got, tolerance: float) -> str:
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"Not compared with transformers ({error}): pip install torch transformers"
    wanted = transformers_block(checkpoint, block, x)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return compare(got, wanted, tolerance, f"MixtralSparseMoeBlock's in float32 ({versions})")


def compare_routing(x: np.ndarray, gate: np.ndarray, topk: int) -> str:
    """How routing changes with dtypes: `x` float32 [T, H], `gate` float32 [E, H]."""
    exact, lines = routing_weights(x, gate, topk), []
    for what, dtypes in {
        "logits in bfloat16, softmax in float32: a Mixtral block in bfloat16": dict(logits=jnp.bfloat16),
        "both in bfloat16": dict(logits=jnp.bfloat16, softmax=jnp.bfloat16),
    }.items():
        weights = routing_weights(x, gate, topk, **dtypes)
        is_same = ((weights > 0) == (exact > 0)).all(-1)
        difference = np.abs(weights - exact)[is_same].max(initial=0)
        lines.append(
            f"  {what}\n    {np.sum(~is_same)} of {len(x)} tokens go to other experts; "
            f"the others' weights change by up to {difference:.1e}"
        )
    return "\n".join(["Router computes logits and softmax in float32, whatever the dtype. Otherwise:", *lines])


# ---- The command ----


def parse_arguments(argv=None) -> argparse.Namespace:
    description, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="PATH", help="a folder, or files; None: writes a tiny one under out/")
    add("--layer", type=int, default=0, help="whose block to load")
    add("--topk", type=int, help=f"experts per token; None: as config.json says, or {DEFAULT_TOPK}")
    add("--dtype", choices=DTYPES.values(), help="to convert to and compute in; None: the checkpoint's")
    add("--tokens", type=int, default=512, help="over all devices; random, normally distributed")
    add("--tensor-parallel", type=int, default=1, help="devices that share an expert, each with a part of F")
    add("--devices", type=int, help=f"None: all GPUs, or {NUM_VIRTUAL_CPU_DEVICES} virtual CPU devices")
    add("--implementation", choices=("cuda", "cpu", "reference"), help="of jax_ep; None: by the devices")
    add("--seed", type=int, default=0, help="of the tokens and the tiny checkpoint")
    return parser.parse_args(argv)


def make_mesh(args: argparse.Namespace, block: Block) -> Mesh:
    """`("ep", "tp")`: experts are split over the first, each expert's F over the second."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Of no effect on GPUs.
        jax.config.update("jax_num_cpu_devices", args.devices or NUM_VIRTUAL_CPU_DEVICES)
    devices, tensor = jax.devices()[: args.devices], args.tensor_parallel
    for size, what in ((len(devices), "devices"), (block.intermediate_size, "intermediate size")):
        if tensor < 1 or size % tensor:
            sys.exit(f"--tensor-parallel: expected a divisor of the {what} {size}, got {tensor}")
    num_ranks = len(devices) // tensor
    if block.num_experts % num_ranks:
        sys.exit(
            f"--devices: expected {block.num_experts} experts to be a multiple of the {num_ranks} ranks, which are "
            f"{len(devices)} devices over --tensor-parallel {tensor}"
        )
    if args.tokens < 1 or args.tokens % num_ranks:
        sys.exit(f"--tokens: expected a multiple of the {num_ranks} ranks, got {args.tokens}")
    return jax.make_mesh((num_ranks, tensor), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_communicator(mesh: Mesh, block: Block, *, num_tokens: int, dtype: str, implementation: str | None = None):
    return jax_ep.MoECommunicator(
        mesh,
        num_experts=block.num_experts,
        hidden_size=block.hidden_size,
        topk=block.topk,
        max_tokens_per_rank=num_tokens // mesh.shape["ep"],
        dtype=dtype,
        implementation=implementation,
    )


def report_of(block: Block, comm: jax_ep.MoECommunicator, num_bytes: int) -> str:
    mesh, mib = comm.mesh, num_bytes / 2**20
    num_ranks, tensor = mesh.devices.shape
    return (
        f"{block.prefix}: {block.num_experts} experts, top {block.topk}, H {block.hidden_size}, "
        f"F {block.intermediate_size}, {block.dtype}\n"
        f"{mesh.size} {mesh.devices.flat[0].platform} devices with 1/{num_ranks} of the experts, 1/{tensor} of F each; "
        f"read {mib:.2f} MiB in all, {mib / mesh.size:.2f} per device\n"
        f"Computed in {jnp.dtype(comm.config.dtype).name}, implementation {comm.config.implementation}"
    )


def main(argv=None) -> None:
    args = parse_arguments(argv)
    if args.checkpoint is None:
        args.checkpoint = [pathlib.Path("out", "tiny_mixtral")]
        write_tiny_checkpoint(args.checkpoint[0], seed=args.seed)
    checkpoint = Checkpoint(args.checkpoint)
    block = Block.find(checkpoint, args.layer, args.topk)
    mesh, dtype = make_mesh(args, block), args.dtype or block.dtype
    # Rounded, so that all compute from the same.
    x = np.random.default_rng(args.seed).normal(size=(args.tokens, block.hidden_size)).astype(dtype)
    with make_communicator(
        mesh, block, num_tokens=args.tokens, dtype=dtype, implementation=args.implementation
    ) as comm:
        layer = load_layer(checkpoint, block, comm)
        print(report_of(block, comm, checkpoint.num_bytes_read))
        y = outputs_of(layer, x)
    x = x.astype(np.float32)
    tolerance = (GPU_TOLERANCE if comm.config.implementation == "cuda" else TOLERANCE)[dtype]
    print(compare(y, numpy_block(checkpoint, block, x), tolerance, "numpy's in float32"))
    print(compare_with_transformers(checkpoint, block, x, y, tolerance))
    print(compare_routing(x, checkpoint.read(block.gate).astype(np.float32), block.topk))


if __name__ == "__main__":
    main()
