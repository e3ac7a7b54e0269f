"""Launches have names in Nsight Systems: a profiler of our own, loaded the way NVTX loads one, writes them down."""

import pathlib
import shutil
import subprocess
import sysconfig

import pytest
from test_examples import ROOT, run_python

PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import jax_ep

mesh = Mesh(jax.devices(), ("ep",))
R, T, K, H = len(jax.devices()), 8, 2, 128
comm = jax_ep.MoECommunicator(mesh, num_experts=2 * R, hidden_size=H, topk=K, max_tokens_per_rank=T, max_requests=1)

def layer(x, topk_ids, weights):
    out, handle = comm.dispatch(x, topk_ids, weights)
    again, _ = comm.dispatch(x, previous_handle=handle)
    request = comm.dispatch_async(again.tokens[:T], topk_ids, weights)
    received, handle = request.wait()
    return comm.combine(received.tokens, handle) + comm.combine_async(received.tokens, handle).wait()

ids = jnp.arange(R * T * K, dtype=jnp.int32).reshape(R * T, K) % (2 * R)
x, weights = jnp.ones((R * T, H), jnp.bfloat16), jnp.ones((R * T, K))
step = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
assert jnp.isfinite(step(x, ids, weights)).all()
comm.check()
"""
NAMES = {
    "jax_ep_dispatch",
    "jax_ep_dispatch_cached",
    "jax_ep_combine",
    "jax_ep_dispatch (send)",
    "jax_ep_dispatch (receive)",
    "jax_ep_combine (send)",
    "jax_ep_combine (receive)",
}


def cuda_headers() -> pathlib.Path | None:
    """Where NVTX's headers are: in a toolkit, or in NVIDIA's package from PyPI."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    toolkits = [pathlib.Path(nvcc).resolve().parents[1] / "include", *pathlib.Path("/usr/local").glob("cuda*/include")]
    packages = pathlib.Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/include")
    return next((path for path in (*toolkits, *packages) if (path / "nvtx3" / "nvToolsExt.h").exists()), None)


def test_nvtx_ranges(native_implementation, tmp_path, monkeypatch):
    headers = cuda_headers()
    if native_implementation != "cuda" or headers is None:
        pytest.skip("NVTX ranges are those of launches on GPUs, and their test needs NVTX's headers")
    library, log = tmp_path / "libnvtx_log.so", tmp_path / "ranges"
    source = ROOT / "tests" / "cpp" / "nvtx_log.c"
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(library)], check=True)
    monkeypatch.setenv("NVTX_INJECTION64_PATH", str(library))
    monkeypatch.setenv("NVTX_LOG", str(log))
    run_python(native_implementation, tmp_path, "-c", PROGRAM)
    ours = {name.removeprefix("jax_ep/") for name in log.read_text().splitlines() if name.startswith("jax_ep/")}
    assert ours == NAMES
