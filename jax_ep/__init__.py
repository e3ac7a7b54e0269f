"""Expert-parallel MoE communication for JAX: dispatch tokens to their experts, combine what they return."""

__version__ = "0.1.0"

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
)

__all__ = [
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
]
