"""The OLMoE example: its model against numpy, and training that goes on from a checkpoint bit by bit."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import suite
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from test_processes import free_port

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import olmoe  # noqa: E402
import text  # noqa: E402

TIMEOUT_S = 240
STEPS, HALF = 4, 2
SIZES = (
    "--hidden 32 --layers 1 --heads 2 --inner 16 --seq-len 16 --batch 8 --experts 8 --topk 2 --warmup 1 "
    f"--bias-rate 1e-3 --steps {STEPS}"
).split()


# ---- Runs of the script ----


def start(implementation: str, directory: pathlib.Path, *arguments, devices: int | None = None) -> subprocess.Popen:
    """As users would, with warnings as errors."""
    settings = dict(JAX_PLATFORMS="cpu") if implementation == "cpu" else {}
    if implementation == "cpu" and devices is not None:
        settings["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", EXAMPLES / "olmoe.py", *SIZES, *map(str, arguments)],
        env=os.environ | settings,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def run(implementation: str, directory: pathlib.Path, *arguments) -> str:
    return output_of(start(implementation, directory, *arguments))


def saved(directory: pathlib.Path, step: int) -> tuple[dict, dict]:
    """All arrays of a checkpoint by name, as orbax alone reads them into numpy; and what `run` says."""
    state, run = directory / str(step) / "state", directory / str(step) / "run" / "metadata"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(state).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = checkpointer.restore(state, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return arrays_of(arrays), json.loads(run.read_text())


def arrays_of(state) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {"/".join(str(getattr(key, "key", key)) for key in path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert (got[name].shape, got[name].dtype) == (want.shape, want.dtype), name
        assert got[name].tobytes() == want.tobytes(), name


def test_resuming_is_exact(native_implementation, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    output = run(native_implementation, tmp_path, "--checkpoint", whole, "--save-every", 1)
    assert f"implementation {native_implementation}" in output and "tokens/s" in output
    assert (tmp_path / "out" / "olmoe.png").stat().st_size > 0
    with ocp.CheckpointManager(whole) as manager:
        assert sorted(manager.all_steps()) == list(range(STEPS - olmoe.CHECKPOINTS_KEPT + 1, STEPS + 1))

    run(native_implementation, tmp_path, "--checkpoint", parts, "--stop-after", HALF)
    half, _ = saved(parts, HALF)
    assert_same_bits(half, saved(whole, HALF)[0])
    resumed = run(native_implementation, tmp_path, "--checkpoint", parts, "--resume")
    assert f"Resumed after step {HALF}" in resumed
    last_state = re.search(f"State after step {STEPS}: [0-9a-f]{{8}}", output).group()
    assert last_state in resumed
    (arrays, history), (wanted, wanted_history) = saved(parts, STEPS), saved(whole, STEPS)
    assert history == wanted_history and len(history["history"]["losses"]) == STEPS
    assert history["data"]["next_batch"] == STEPS + 1
    assert_same_bits(arrays, wanted)
    # Each kind of state has moved since the checkpoint.
    for kind in ("model/blocks/0/moe/gate", "model/blocks/0/moe/router/bias", "optimizer/opt_state", "optimizer/step"):
        assert any(name.startswith(kind) and np.any(arrays[name] != half[name]) for name in arrays), kind


def test_several_processes_write_what_one_reads(native_implementation, tmp_path, monkeypatch):
    devices = len(suite.devices_of(native_implementation))
    if devices < 2:
        pytest.skip("needs 2 devices")
    checkpoint = ["--remat", "--checkpoint", tmp_path / "run"]
    arguments = [*checkpoint, "--data", 2, "--stop-after", HALF]
    together = ["--coordinator", f"localhost:{free_port()}", "--num-processes", 2]
    processes = []
    for i in range(2):
        if native_implementation == "cuda":
            half = range(devices // 2 * i, devices // 2 * (i + 1))
            monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, half)))
        processes.append(start(native_implementation, tmp_path, *arguments, *together, "--process-id", i, devices=4))
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    outputs = [output_of(process) for process in processes]
    assert "Plot in" in outputs[0] and "Plot in" not in outputs[1]
    fingerprint = saved(tmp_path / "run", HALF)[1]["fingerprint"]
    output = run(native_implementation, tmp_path, *checkpoint, "--resume", "--devices", 1)
    assert f"Resumed after step {HALF}: state {fingerprint}" in output
    losses = saved(tmp_path / "run", STEPS)[1]["history"]["losses"]
    assert len(losses) == STEPS and np.all(np.isfinite(losses))


# ---- In this process ----


@pytest.fixture(autouse=True)
def as_examples_run(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # which make_mesh adds to
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        yield


def mesh_of(devices, data: int = 1) -> Mesh:
    return Mesh(np.array(devices).reshape(data, -1), ("data", "ep"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def trainer_of(native_implementation):
    """`(trainer, args, text)` of flags, on so many of the implementation's devices; communicators are destroyed."""
    trainers = []

    def make(*flags, devices: int, data: int = 1):
        args = olmoe.parse_arguments(list(map(str, (*SIZES, "--implementation", native_implementation, *flags))))
        mesh = mesh_of(suite.devices_of(native_implementation)[:devices], data)
        trainer = olmoe.Trainer(olmoe.make_communicator(mesh, args), args)
        trainers.append(trainer)
        batches = text.Text(trainer.batch_sharding, batch=args.batch, seq_len=args.seq_len, seed=args.seed)
        return trainer, args, batches

    yield make
    for trainer in trainers:
        trainer.comm.destroy()


def test_restores_onto_other_devices(trainer_of, native_implementation, tmp_path):
    available = len(suite.devices_of(native_implementation))
    trainer, args, batches = trainer_of(devices=available)
    trainer.start()
    history = olmoe.History()
    history.add(*trainer.train_step(batches.training_batch(1)), routed=8 * 16 * 2)
    checkpoints = olmoe.Checkpoints(tmp_path / "run", args, batches)
    checkpoints.save(1, trainer, history)
    wanted = arrays_of(trainer.state())
    trainer.train_step(batches.training_batch(2))  # which donates what is being saved
    checkpoints.close()
    assert_same_bits(saved(tmp_path / "run", 1)[0], wanted)

    for devices, data in ((4, 2), (1, 1)):
        if devices > available:
            continue
        other, args, batches = trainer_of(devices=devices, data=data)
        checkpoints = olmoe.Checkpoints(tmp_path / "run", args, batches)
        assert checkpoints.restore(other) == (1, history)
        checkpoints.close()
        assert_same_bits(arrays_of(other.state()), wanted)
        gate = other.model.blocks[0].moe.gate[...]
        assert gate.sharding.mesh == other.comm.mesh and gate.sharding.spec[0] == "ep"
        assert gate.addressable_shards[0].data.shape[0] == args.experts // (devices // data)


def test_a_checkpoint_of_another_run(trainer_of, tmp_path):
    trainer, args, batches = trainer_of(devices=1)
    trainer.start()
    checkpoints = olmoe.Checkpoints(tmp_path / "run", args, batches)
    checkpoints.save(1, trainer, olmoe.History())
    checkpoints.close()
    fingerprint = trainer.fingerprint()

    def restore_with(*flags, file=None):
        args = olmoe.parse_arguments([*SIZES, *flags])
        some = text.Text(trainer.batch_sharding, batch=args.batch, seq_len=args.seq_len, seed=args.seed, file=file)
        checkpoints = olmoe.Checkpoints(tmp_path / "run", args, some)
        try:
            checkpoints.restore(trainer)
        finally:
            checkpoints.close()

    restore_with()
    with pytest.raises(SystemExit, match=r"^--batch: expected 8, as in the checkpoint, got 16$"):
        restore_with("--batch", "16")
    with pytest.raises(SystemExit, match=r"^--text: expected the text of the checkpoint, got olmoe.py"):
        restore_with(file=EXAMPLES / "olmoe.py")
    args.checkpoint = tmp_path / "run"
    with pytest.raises(
        SystemExit, match=r"^--checkpoint: expected --resume or another directory, since .* has step 1$"
    ):
        olmoe.open_checkpoints(args, batches)
    args.checkpoint, args.resume = tmp_path / "other", True
    with pytest.raises(SystemExit, match=r"^--resume: expected a checkpoint in .*other, got none$"):
        olmoe.open_checkpoints(args, batches)
    (file,) = (file for file in (tmp_path / "run" / "1" / "run").iterdir() if fingerprint in file.read_text())
    file.write_text(file.read_text().replace(fingerprint, "00000000"))
    with pytest.raises(SystemExit, match=r"^--resume: the state of step 1 is not what was saved: expected 00000000"):
        restore_with()


def test_fingerprint_sees_each_bit_whatever_the_sharding(native_implementation):
    mesh = mesh_of(suite.devices_of(native_implementation))
    value = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    count = np.int32(7)
    of = jax.jit(olmoe.fingerprint)
    wanted = int(of((value, count)))
    assert int(of((jax.device_put(value, NamedSharding(mesh, P("ep"))), count))) == wanted
    for index, bit in itertools.product(((0, 0), (7, 2)), (0, 31)):
        other = value.copy()
        other.view(np.uint32)[index] ^= np.uint32(1 << bit)
        assert int(of((other, count))) != wanted
    assert int(of((value[::-1], count))) != wanted and int(of((value, np.int32(8)))) != wanted


# ---- The model ----


def numpy_logits(parameters: dict, bytes_: np.ndarray, heads: int, topk: int) -> np.ndarray:
    """The published model in float64, a loop over layers, heads, tokens and their experts."""

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale

    def rotated(x):  # [length, head size]: halves as complex numbers, whose angles grow with the position
        half = x.shape[-1] // 2
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
            1j * np.outer(np.arange(len(x)), 1e4 ** (-np.arange(half) / half))
        )
        return np.concatenate([turned.real, turned.imag], -1)

    def attention(x, p):
        queries, keys = (norm(x @ p[name]["kernel"], p[f"{name}_norm"]["scale"]) for name in ("query", "key"))
        outputs, by_head = [], (np.split(y, heads, -1) for y in (queries, keys, x @ p["value"]["kernel"]))
        for q, k, v in zip(*by_head, strict=True):
            scores = rotated(q) @ rotated(k).T / np.sqrt(q.shape[-1])
            scores = np.exp(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
            outputs.append(scores / scores.sum(-1, keepdims=True) @ v)
        return np.concatenate(outputs, -1) @ p["out"]["kernel"]

    def experts(token, p):
        scores = np.exp(token @ p["router"]["kernel"])
        scores /= scores.sum()
        y = np.zeros_like(token)
        for expert in np.argsort(-scores)[:topk]:
            gate = token @ p["gate"][expert]
            y += scores[expert] * (gate / (1 + np.exp(-gate)) * (token @ p["up"][expert])) @ p["down"][expert]
        return y

    x = parameters["embed"]["embedding"][bytes_]
    for block in parameters["blocks"].values():
        x = x + attention(norm(x, block["attention_norm"]["scale"]), block["attention"])
        x = x + np.stack([experts(token, block["moe"]) for token in norm(x, block["moe_norm"]["scale"])])
    return norm(x, parameters["norm"]["scale"]) @ parameters["head"]["kernel"]


def test_model_is_what_numpy_says(trainer_of, native_implementation):
    trainer, args, batches = trainer_of(
        "--layers", 2, "--capacity-factor", 8, devices=len(suite.devices_of(native_implementation))
    )
    trainer.start()
    assert all(block.moe.communicator is trainer.comm for block in trainer.model.blocks)
    batch = batches.training_batch(1)
    logits, aux = nnx.jit(lambda model, batch: model(batch))(trainer.model, batch[:, :-1].astype(np.int32))
    trainer.comm.check()
    assert int(aux.num_dropped.sum()) == 0
    parameters = jax.device_get(nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param)))
    parameters = jax.tree.map(lambda array: np.asarray(array, np.float64), parameters)
    rows = np.asarray(jax.device_get(batch))[:, :-1]
    for row, got in zip(rows[:2], jax.device_get(logits), strict=False):
        wanted = numpy_logits(parameters, row, args.heads, args.topk)
        np.testing.assert_allclose(got, wanted, atol=5e-3 if native_implementation == "cuda" else 2e-5)


def test_published_size():
    args = olmoe.parse_arguments("--size olmoe-1b-7b --vocabulary 50304 --implementation reference".split())
    mesh = mesh_of(jax.devices()[:1])
    with olmoe.make_communicator(mesh, args) as comm:
        # 6.9 billion, and 1.3 for each token, as published.
        assert olmoe.describe(olmoe.Trainer(comm, args), args).startswith("6,919,161,856 parameters, 1,282,017,280 of")


# ---- The text ----


def test_batches_follow_from_seed_and_step():
    sharding = SingleDeviceSharding(jax.devices()[0])
    first, again, other = (text.Text(sharding, batch=4, seq_len=16, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.training_batch(3), again.training_batch(3))
    assert np.any(first.training_batch(3) != first.training_batch(4))
    assert np.any(first.training_batch(3) != other.training_batch(3))
    np.testing.assert_array_equal(first.validation_batches(2), other.validation_batches(2))


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "ab").write_bytes(b"ab" * 2000)
    sharding = SingleDeviceSharding(jax.devices()[0])
    some = text.Text(sharding, batch=2, seq_len=8, seed=0, file=tmp_path / "ab")
    assert (some.name, some.num_bytes) == ("ab", 4000) and some.entropy == pytest.approx(np.log(2))
    assert set(np.asarray(some.training_batch(1)).ravel()) == set(b"ab")
    (tmp_path / "ab").write_bytes(b"ab")
    with pytest.raises(ValueError, match="text: expected at least 900 bytes, got 2"):
        text.Text(sharding, batch=2, seq_len=8, seed=0, file=tmp_path / "ab")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--hidden 30 --heads 4", "--hidden: expected a multiple of 8, twice the heads, got 30"),
        ("--vocabulary 255", "--vocabulary: expected at least the 256 bytes, got 255"),
        ("--steps 10 --warmup 10", "--warmup: expected less than the 10 steps, got 10"),
        ("--steps 10 --stop-after 11", "--stop-after: expected one of the 10 steps, got 11"),
        ("--resume", "--resume: expected --checkpoint besides, got none"),
        ("--capacity-factor 0", "--capacity-factor: expected more than 0, got 0.0"),
        ("--devices 2 --num-processes 2", "--devices: expected none with 2 processes, got 2"),
        ("--layers 0", "--layers: expected at least 1, got 0"),
    ],
)
def test_flag_errors(capsys, flags, error):
    with pytest.raises(SystemExit):
        olmoe.parse_arguments(flags.split())
    assert error in capsys.readouterr().err
