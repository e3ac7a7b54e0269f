"""Expert-parallel MoE communication for JAX: dispatch tokens to their experts, combine what they return."""

from jax_ep._quant import dequantize
from jax_ep._version import __version__
from jax_ep.communicator import MoECommunicator, MoECommunicatorConfig
from jax_ep.stats import LoadStatistics, RankLoad, load_statistics, plot_load
from jax_ep.types import (
    CapacityError,
    CombineRequest,
    DispatchHandle,
    DispatchLayout,
    DispatchLayoutInfo,
    DispatchOutput,
    DispatchRequest,
    ExpertIdError,
    MoEMode,
    PeerTimeoutError,
    QuantConfig,
    QuantOutput,
)

__all__ = [
    "__version__",
    "CapacityError",
    "CombineRequest",
    "DispatchHandle",
    "DispatchLayout",
    "DispatchLayoutInfo",
    "DispatchOutput",
    "DispatchRequest",
    "ExpertIdError",
    "LoadStatistics",
    "MoECommunicator",
    "MoECommunicatorConfig",
    "MoEMode",
    "PeerTimeoutError",
    "QuantConfig",
    "QuantOutput",
    "RankLoad",
    "dequantize",
    "load_statistics",
    "plot_load",
]
