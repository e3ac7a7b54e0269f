"""Names of PyTorch's expert-parallel libraries for programs that are ported: DeepEP's `Buffer`, UCCL-EP's `UCCLBuffer`,
and in `jax_ep.compat.fused_a2a` the functions of Megatron and NeMo. docs/compat.md maps them all."""

from jax_ep.compat._deepep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t
from jax_ep.compat._uccl import UCCLBuffer

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "UCCLBuffer", "topk_idx_t"]
