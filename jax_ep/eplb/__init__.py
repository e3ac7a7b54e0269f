"""Expert parallel load balancing: which experts to replicate, and where."""

from jax_ep._placement import ExpertPlacement, Placement, to_physical
from jax_ep.eplb._communicator import EplbCommunicator, create_eplb_communicator
from jax_ep.eplb._movers import TransferStatistics
from jax_ep.eplb._placement_moves import count_moves, replan_experts
from jax_ep.eplb._planner import gpu_imbalance, rebalance_experts
from jax_ep.eplb._recorder import LoadRecorder
from jax_ep.eplb._routing import (
    replicate_experts,
    share_replica_gradients,
    sum_replica_gradients,
    tie_replicas,
)
from jax_ep.eplb._transfer import transfer_experts

__all__ = [
    "EplbCommunicator",
    "ExpertPlacement",
    "LoadRecorder",
    "Placement",
    "TransferStatistics",
    "count_moves",
    "create_eplb_communicator",
    "gpu_imbalance",
    "rebalance_experts",
    "replan_experts",
    "replicate_experts",
    "share_replica_gradients",
    "sum_replica_gradients",
    "tie_replicas",
    "to_physical",
    "transfer_experts",
]
