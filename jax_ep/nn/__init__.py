"""Expert-parallel mixture-of-experts layers for Flax NNX. Needs Flax: `pip install 'jax_ep[nn]'`."""

try:
    import flax.nnx  # noqa: F401
except ImportError as error:
    raise ImportError("jax_ep.nn: expected Flax 0.12.4 or newer, got none: pip install 'jax_ep[nn]'") from error

from jax_ep.nn._matmul import default_grouped_matmul
from jax_ep.nn._moe import MoE, MoEAux
from jax_ep.nn._rebalance import ExpertSlots, RecordedLoad, StepsSincePlan
from jax_ep.nn._router import Router, RouterAux, SelectionBias

__all__ = [
    "ExpertSlots",
    "MoE",
    "MoEAux",
    "RecordedLoad",
    "Router",
    "RouterAux",
    "SelectionBias",
    "StepsSincePlan",
    "default_grouped_matmul",
]
