"""What this machine and this installation have."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import jax

import jax_ep
from jax_ep import _bootstrap, _ffi
from jax_ep.doctor.findings import Device, Extension, Gpu, Machine

_VARIABLES = (
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "CUDA_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "CUDA_MODULE_LOADING",
    "JAX_EP_NUM_SMS",
    "JAX_EP_DISPATCH_BLOCKS",
    "JAX_EP_COMBINE_BLOCKS",
)
_PTRACE_SCOPE = pathlib.Path("/proc/sys/kernel/yama/ptrace_scope")
_TIMEOUT_S = 20
# Another process opens memory of this one, as the CPU ops of two processes do.
_OPEN_MEMORY = "import os, sys; os.close(os.open(sys.argv[1], os.O_RDWR))"


def collect_machine() -> Machine:
    """All of it; starts JAX's backends."""
    # Before extensions load, which may set some.
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    devices = [_device(device) for device in jax.local_devices()]
    versions = _versions()
    gpus = nvidia_gpus()
    if gpus:
        versions["NVIDIA driver"] = gpus[0].driver
    return Machine(
        versions=versions,
        devices=devices,
        num_processes=jax.process_count(),
        process=jax.process_index(),
        gpus=gpus,
        extensions=[Extension(name, extension_error(name)) for name in ("cpu", "cuda")],
        environment=environment,
        host=_bootstrap.host_identity(),
        ptrace_scope=_PTRACE_SCOPE.read_text().strip() if _PTRACE_SCOPE.exists() else None,
        processes_apart=what_keeps_processes_apart(),
    )


def _versions() -> dict[str, str]:
    runtime = getattr(jax.local_devices()[0].client, "platform_version", "")
    return {
        "jax_ep": jax_ep.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "Python": platform.python_version(),
        "JAX runtime": " ".join(runtime.split()) or "unknown",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _device(device: jax.Device) -> Device:
    try:
        pool_bytes = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # not every platform counts
        pool_bytes = None
    capability = getattr(device, "compute_capability", None)
    return Device(
        id=device.id,
        platform=device.platform,
        kind=device.device_kind,
        process=device.process_index,
        compute_capability=None if capability is None else str(capability),
        pool_bytes=pool_bytes,
    )


def nvidia_gpus() -> list[Gpu]:
    """What nvidia-smi lists; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(output)


def parse_gpus(csv: str) -> list[Gpu]:
    """Lines of name, driver, MiB; lines that are anything else are left out."""
    lines = [[cell.strip() for cell in line.split(",")] for line in csv.splitlines()]
    return [Gpu(c[0], c[1], int(c[2]) << 20) for c in lines if len(c) == 3 and c[2].isdigit()]


def extension_error(name: str) -> str | None:
    """What keeps an extension from loading, and from registering its ops."""
    try:
        _ffi.extension(name)
    except Exception as error:  # a library that is missing, a symbol, a registration: all are worth telling
        return f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
    return None


def what_keeps_processes_apart() -> str | None:
    """Why a process that this one starts cannot open its memory; None if it can."""
    if not hasattr(os, "memfd_create"):
        return "no memfd_create: not Linux"
    descriptor = os.memfd_create("jax_ep_doctor")
    try:
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        command = [sys.executable, "-I", "-S", "-c", _OPEN_MEMORY, path]
        child = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    finally:
        os.close(descriptor)
    return None if child.returncode == 0 else (child.stderr.strip().splitlines() or ["unknown"])[-1]
