"""The memory that a communicator of a given configuration would take."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_ep import MoECommunicator, MoECommunicatorConfig
from jax_ep.doctor.findings import Arena

_ON_GPUS = "memory that each GPU holds outside JAX's pool for peers to write to, one arena and one more per request"
_ON_CPUS = (
    "address space that each process reserves for the others to read from, filled as it is written; 0 within one "
    "process, whose ranks read each other's arrays"
)
_NOT_KNOWN = "not known on this machine: a communicator for GPUs has to be built to tell, with jax_ep's cuda extension"
_NO_ARENA = "the reference has no arena: XLA allocates its temporaries in JAX's pool"


def measure_arena(config: MoECommunicatorConfig, devices: list[jax.Device]) -> Arena:
    """Builds the communicator over all devices of this process, asks it, and destroys it."""
    mesh = Mesh(np.array(devices), (config.axis_name,), axis_types=(AxisType.Auto,))
    shown = described(config) | dict(num_ranks=mesh.size)
    try:
        comm = MoECommunicator(mesh, config)
    except Exception as error:  # what keeps it from being built is the answer
        implementation = {"gpu": "cuda", "cpu": "cpu"}.get(devices[0].platform, "reference")
        return Arena(shown, implementation, None, "the communicator was not built", f"{type(error).__name__}: {error}")
    with comm:
        implementation = str(comm.config.implementation)
        meaning = {"cuda": _ON_GPUS, "cpu": _ON_CPUS}.get(implementation, _NO_ARENA)
        if implementation == "cpu":
            meaning = f"{meaning}. What GPUs would take is {_NOT_KNOWN}"
        return Arena(shown, implementation, comm.arena_bytes, meaning)


def described(config: MoECommunicatorConfig) -> dict[str, Any]:
    """What decides how large an arena is."""
    names = ("num_experts", "hidden_size", "topk", "max_tokens_per_rank", "max_requests")
    sizes: dict[str, Any] = {name: getattr(config, name) for name in names}
    return sizes | dict(mode=config.mode.value, dtype=np.dtype(config.dtype).name)
