"""Whether an installed jax_ep is whole: `python -I tests/smoke.py`, in an environment that has it installed.

Needs nothing but what jax_ep itself depends on. `make wheel` runs it on the wheel that it builds.
"""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

NUM_DEVICES = 4
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep

DOCTOR_TIMEOUT_S = 300


def check_files() -> None:
    """The package, its types and its licence were installed, and nothing else."""
    distribution = importlib.metadata.distribution("jax_ep")
    files = {str(path) for path in distribution.files if not path.suffix == ".pyc"}
    package = pathlib.Path(jax_ep.__file__).parent
    assert package == pathlib.Path(distribution.locate_file("jax_ep")), f"not the installed one: {package}"
    assert distribution.version == jax_ep.__version__, (distribution.version, jax_ep.__version__)
    assert files >= {"jax_ep/py.typed", "jax_ep/_cpu.pyi", "jax_ep/_cuda.pyi"}, files
    assert any(re.fullmatch(r"jax_ep/_cpu\.(abi3|cpython-.*)\.so", name) for name in files), files
    foreign = [
        name
        for name in files
        if not re.fullmatch(r"jax_ep/.*\.(py|pyi|so)|jax_ep/py\.typed|jax_ep-[^/]*\.dist-info/.*", name)
    ]
    assert not foreign, foreign
    assert any(name.endswith("licenses/LICENSE") for name in files), files


def run_layer(implementation: str) -> list[np.ndarray]:
    """The output of a small layer, and its gradients."""
    num_experts, topk, num_tokens, hidden_size = 8, 2, 16, 32
    mesh = Mesh(jax.devices(), ("ep",))
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (NUM_DEVICES * num_tokens, hidden_size))
    weights, topk_ids = jax.lax.top_k(jax.random.uniform(keys[1], (len(x), num_experts)), topk)
    matrices = jax.random.normal(keys[2], (num_experts, hidden_size, hidden_size))
    gradient = jax.random.normal(keys[3], x.shape)
    with jax_ep.MoECommunicator(
        mesh,
        num_experts=num_experts,
        hidden_size=hidden_size,
        topk=topk,
        max_tokens_per_rank=num_tokens,
        dtype=jnp.float32,
        implementation=implementation,
    ) as comm:

        @jax.shard_map(mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        def layer(x, weights, matrices, topk_ids):
            out, handle = comm.dispatch(x, topk_ids, weights)
            return comm.combine(jax.lax.ragged_dot(out.tokens, matrices, out.layout.num_tokens_per_expert), handle)

        @jax.jit
        def step(x, weights, matrices):
            out, pull = jax.vjp(lambda *arguments: layer(*arguments, topk_ids), x, weights, matrices)
            return out, *pull(gradient)

        results = [np.asarray(part) for part in step(x, weights, matrices)]
        comm.check()
        return results


def check_layer() -> None:
    for name, got, want in zip(
        ("output", "x's", "weights'", "matrices'"), run_layer("cpu"), run_layer("reference"), strict=True
    ):
        assert np.abs(want).max() > 0.1, name
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)


def check_doctor() -> None:
    command = [sys.executable, "-I", "-m", "jax_ep.doctor", "--skip-links"]
    printed = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DOCTOR_TIMEOUT_S, check=False
    )
    assert printed.returncode == 0, printed.stdout


def main() -> None:
    assert jax.device_count() == NUM_DEVICES
    for check in (check_files, check_layer, check_doctor):
        check()
        print(f"{check.__name__}: passed")
    print(f"jax_ep {jax_ep.__version__} in {sys.prefix}, jax {jax.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
