"""Expert-parallel MoE communication for JAX: dispatch tokens to their experts, combine what they return."""

from jax_ep._quant import dequantize
from jax_ep._version import __version__
from jax_ep.communicator import MoECommunicator, MoECommunicatorConfig
from jax_ep.types import (
    CapacityError,
    DispatchHandle,
    DispatchLayout,
    DispatchLayoutInfo,
    DispatchOutput,
    ExpertIdError,
    MoEMode,
    PeerTimeoutError,
    QuantConfig,
    QuantOutput,
)

__all__ = [
    "__version__",
    "CapacityError",
    "DispatchHandle",
    "DispatchLayout",
    "DispatchLayoutInfo",
    "DispatchOutput",
    "ExpertIdError",
    "MoECommunicator",
    "MoECommunicatorConfig",
    "MoEMode",
    "PeerTimeoutError",
    "QuantConfig",
    "QuantOutput",
    "dequantize",
]
