"""A block from a Mixtral checkpoint computes what it was trained to compute, and devices read what is theirs alone."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from test_examples import ROOT, run_python

sys.path.append(str(ROOT / "examples"))
import load_mixtral

TOKENS, LAYER, TOPK = 64, 1, 2


@pytest.fixture
def folder(request, tmp_path) -> pathlib.Path:
    """A checkpoint in two files with an index; `LAYER` is in the second."""
    load_mixtral.write_tiny_checkpoint(tmp_path / "checkpoint", dtype=getattr(request, "param", "float32"))
    return tmp_path / "checkpoint"


@pytest.fixture
def load():
    """The layer on all devices, whose communicator is destroyed in the end."""
    communicators = []

    def load_layer(checkpoint, block, implementation, tensor=1):
        devices = suite.devices_of(implementation)
        tensor = min(tensor, len(devices))
        shape = len(devices) // tensor, tensor
        mesh = jax.make_mesh(shape, ("ep", "tp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
        communicators.append(
            load_mixtral.make_communicator(
                mesh, block, num_tokens=TOKENS, dtype=block.dtype, implementation=implementation
            )
        )
        return load_mixtral.load_layer(checkpoint, block, communicators[-1])

    yield load_layer
    for communicator in communicators:
        communicator.destroy()


def tokens_of(block) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(TOKENS, block.hidden_size)).astype(block.dtype)


def token_by_token(tensors, x) -> np.ndarray:
    """`x` [T, H] -> float64 [T, H], as the paper has it (Jiang et al., 2024): a softmax over the K best logits."""
    tensors = {
        name.split(".", 3)[3]: tensor.astype(np.float64) for name, tensor in tensors.items() if f".{LAYER}." in name
    }
    y = []
    for token in x.astype(np.float64):
        logits = tensors["block_sparse_moe.gate.weight"] @ token
        best = np.argsort(logits)[-TOPK:]
        weights, total = np.exp(logits[best]) / np.exp(logits[best]).sum(), 0
        for expert, weight in zip(best, weights, strict=True):
            w1, w2, w3 = (tensors[f"block_sparse_moe.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            gate = w1 @ token
            total = total + weight * (w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ token)))
        y.append(total)
    return np.stack(y)


def tolerance_of(implementation, dtype) -> float:
    return (load_mixtral.GPU_TOLERANCE if implementation == "cuda" else load_mixtral.TOLERANCE)[dtype]


def assert_close(got, wanted, implementation, dtype="float32"):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance_of(implementation, dtype) * np.abs(wanted).max())


def sizes_in_file(file) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())


# ---- The script ----


def test_runs_as_printed(native_implementation, tmp_path):
    output = run_python(native_implementation, tmp_path, ROOT / "examples" / "load_mixtral.py")
    assert f"implementation {native_implementation}" in output
    assert "The outputs are numpy's in float32" in output
    assert "transformers" in output and "both in bfloat16" in output


# ---- The layer ----


@pytest.mark.parametrize(
    ("folder", "tensor"),
    [("float32", 1), ("float32", 4), ("bfloat16", 2), ("float16", 1)],
    indirect=["folder"],
)
def test_is_the_block(load, folder, native_implementation, tensor):
    checkpoint = load_mixtral.Checkpoint([folder])
    block = load_mixtral.Block.find(checkpoint, LAYER)
    file = folder / "model-00002-of-00002.safetensors"
    layer, x = load(checkpoint, block, native_implementation, tensor), tokens_of(block)
    assert checkpoint.num_bytes_read == sizes_in_file(file)  # each byte once
    num_ranks, tensor = layer.communicator.mesh.devices.shape
    for name, shape in (("gate", (8, 64, 96)), ("up", (8, 64, 96)), ("down", (8, 96, 64))):
        kernel = getattr(layer, name)[...]
        assert kernel.shape == shape and kernel.dtype == block.dtype
        assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // (num_ranks * tensor)}
    wanted = token_by_token(load_file(file), x)
    assert_close(load_mixtral.outputs_of(layer, x), wanted, native_implementation, block.dtype)
    with jax.default_device(jax.devices("cpu")[0]):
        assert_close(load_mixtral.numpy_block(checkpoint, block, x.astype(np.float32)), wanted, "cpu", "float32")


def test_a_device_reads_its_experts_alone(load, folder, tmp_path):
    checkpoint = load_mixtral.Checkpoint([folder])
    block = load_mixtral.Block.find(checkpoint, LAYER)
    layer = load(checkpoint, block, "reference", tensor=2)
    tensors, by_expert = load_file(folder / "model-00002-of-00002.safetensors"), tmp_path / "by_expert"
    by_expert.mkdir()
    files = {name: f"{name.split('.')[5]}.safetensors" for name in tensors if ".experts." in name}
    (by_expert / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=files)))
    for name in load_mixtral.LINEARS:
        for shard in getattr(layer, name)[...].addressable_shards:
            for file in by_expert.glob("*.safetensors"):
                file.unlink()
            for expert in range(block.num_experts)[shard.index[0]]:
                own = {name: tensors[name] for name, file in files.items() if file == f"{expert}.safetensors"}
                save_file(own, by_expert / f"{expert}.safetensors")
            device = load_mixtral.Checkpoint([by_expert])
            part = load_mixtral.read_kernel(device, block, name, shard.index, "float32")
            np.testing.assert_array_equal(part, shard.data)
            assert device.num_bytes_read == part.nbytes


# ---- The checkpoint ----


def test_folders_and_files(folder, tmp_path):
    by_index = load_mixtral.Checkpoint([folder])
    both = sorted(folder.glob("*.safetensors"))
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({name: by_index.read(name) for name in by_index.names()}, plain / "model.safetensors")
    for paths in ([plain], both, both[1:]):
        checkpoint = load_mixtral.Checkpoint(paths)
        block = load_mixtral.Block.find(checkpoint, LAYER)
        for expert in range(block.num_experts):
            name = block.linear(expert, "w2")
            np.testing.assert_array_equal(checkpoint.read(name), by_index.read(name))
    # Without a config, the default.
    assert load_mixtral.Block.find(load_mixtral.Checkpoint([plain]), 0, topk=3).topk == 3
    assert load_mixtral.Block.find(load_mixtral.Checkpoint([plain]), 0).topk == load_mixtral.DEFAULT_TOPK


def rewrite_config(folder, **changes):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def test_config_says_topk(folder):
    rewrite_config(folder, num_experts_per_tok=4)
    checkpoint = load_mixtral.Checkpoint([folder])
    assert load_mixtral.Block.find(checkpoint, LAYER).topk == 4
    assert load_mixtral.Block.find(checkpoint, LAYER, topk=1).topk == 1


def test_unusable_checkpoints(folder, tmp_path):
    def error_of(*paths, layer=LAYER) -> str:
        with pytest.raises(SystemExit) as error:
            checkpoint = load_mixtral.Checkpoint(paths)
            block = load_mixtral.Block.find(checkpoint, layer)
            load_mixtral.numpy_block(checkpoint, block, np.zeros((1, block.hidden_size), np.float32))
        return str(error.value)

    first, second = sorted(folder.glob("*.safetensors"))
    assert error_of(folder, layer=2) == "--layer: expected one of the layers [0, 1] in the files, got 2"
    assert error_of(first) == "--layer: expected one of the layers [0] in the files, got 1"
    assert "expected safetensors files, got none" in error_of(tmp_path)
    assert f"expected a safetensors file {tmp_path / 'no'}, got none" in error_of(tmp_path / "no")
    rewrite_config(folder, hidden_act="gelu")
    assert error_of(folder) == "--checkpoint: expected hidden_act silu, got gelu"
    rewrite_config(folder, hidden_act="silu")
    tensors = load_file(second)
    name = next(name for name in tensors if name.endswith("7.w3.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, second)
    assert f"expected {name} in the files, got none" in error_of(second)
    save_file({key: tensor.astype(np.int8) for key, tensor in tensors.items()}, second)
    assert error_of(folder) == "--checkpoint: expected weights in F32, F16, BF16, got I8"
    second.unlink()
    assert f"expected a safetensors file {second}, got none" in error_of(folder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--tensor-parallel 5", "--tensor-parallel: expected a divisor of the devices"),
        ("--tokens 0", "--tokens: expected a multiple of the"),
        ("--devices 3", "--devices: expected 8 experts to be a multiple of the 3 ranks"),
    ],
)
def test_unusable_options(folder, options, text):
    if options == "--devices 3" and len(jax.devices()) < 3:
        pytest.skip("fewer than 3 devices")
    with pytest.raises(SystemExit, match=text):
        load_mixtral.main(["--checkpoint", str(folder), *options.split()])


# ---- The router's dtypes ----


def test_routing_weights_are_the_softmax_of_the_chosen():
    rng = np.random.default_rng(3)
    x, gate = rng.normal(size=(TOKENS, 64)).astype(np.float32), rng.normal(size=(8, 64)).astype(np.float32)
    weights = load_mixtral.routing_weights(x, gate, TOPK)
    logits = (x @ gate.T).astype(np.float64)
    chosen = logits >= np.sort(logits, axis=-1)[:, -TOPK, None]
    wanted = np.where(chosen, np.exp(logits), 0)
    np.testing.assert_allclose(weights, wanted / wanted.sum(-1, keepdims=True), atol=1e-6)
    rounded = load_mixtral.routing_weights(x, gate, TOPK, logits=jnp.bfloat16)
    assert 1e-4 < np.abs(rounded - weights)[((rounded > 0) == chosen).all(-1)].max() < 3e-2


def test_wrong_outputs_end_the_script():
    wanted = np.ones((2, 3))
    assert load_mixtral.compare(wanted + 1e-6, wanted, 1e-5, "theirs").startswith("The outputs are theirs")
    for wrong in (wanted + 1e-4, wanted * np.nan):
        with pytest.raises(SystemExit, match="The outputs are not theirs"):
            load_mixtral.compare(wrong, wanted, 1e-5, "theirs")


# ---- transformers ----


def test_is_the_block_that_transformers_saved(load, native_implementation, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=96, num_local_experts=8, num_experts_per_tok=TOPK)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path, max_shard_size="200KB", safe_serialization=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = load_mixtral.Checkpoint([tmp_path])
    block = load_mixtral.Block.find(checkpoint, LAYER)
    x = tokens_of(block)
    got = load_mixtral.outputs_of(load(checkpoint, block, native_implementation), x)
    layer = model.model.layers[LAYER]
    module = layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)[None])
    wanted = (wanted[0] if isinstance(wanted, tuple) else wanted)[0].numpy()
    assert_close(got, wanted, native_implementation)
    assert_close(load_mixtral.transformers_block(checkpoint, block, x), wanted, "cpu")
    assert_close(load_mixtral.numpy_block(checkpoint, block, x), wanted, "cpu")


@pytest.mark.parametrize("folder", ["bfloat16"], indirect=True)
def test_transformers_rounds_logits_but_not_the_softmax(folder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    checkpoint = load_mixtral.Checkpoint([folder])
    block = load_mixtral.Block.find(checkpoint, LAYER)
    x, gate = tokens_of(block).astype(np.float32), checkpoint.read(block.gate).astype(np.float32)
    module, seen = load_mixtral.transformers_module(checkpoint, block, "bfloat16"), []
    module.gate.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    with torch.no_grad():
        module(torch.from_numpy(x).to(torch.bfloat16)[None])
    # Version 5 gives the logits, the weights and the experts.
    logits = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert logits.dtype == torch.bfloat16
    np.testing.assert_array_equal(logits.float().numpy(), (x @ gate.T).astype(jnp.bfloat16).astype(np.float32))
    if isinstance(seen[0], tuple):
        weights = np.zeros((TOKENS, block.num_experts), np.float32)
        np.put_along_axis(weights, seen[0][2].numpy(), seen[0][1].float().numpy(), -1)
        wanted = load_mixtral.routing_weights(x, gate, TOPK, logits=jnp.bfloat16)
        np.testing.assert_allclose(weights, wanted, atol=1e-6)
