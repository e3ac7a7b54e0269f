"""Expert parallel load balancing: which experts to replicate, and where."""

from jax_ep.eplb._placement_moves import count_moves, replan_experts
from jax_ep.eplb._planner import Placement, gpu_imbalance, rebalance_experts

__all__ = ["Placement", "count_moves", "gpu_imbalance", "rebalance_experts", "replan_experts"]
