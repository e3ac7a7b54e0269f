"""Transfer: slots of equal size, such as the weights of experts, from rank to rank, bit by bit."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ep import _ffi, _reference

# In the place of a slot's source: it becomes zeros, or comes from another rank. Contract with ffi/common/ops.h.
EMPTY, ARRIVES = -1, -2


class TransferTables(NamedTuple):
    """What a transfer does, as one rank sees it. All int32; any leading dimensions.

    Attributes:
      source: `[D]`, this rank's slot that fills slot d, or EMPTY or ARRIVES.
      next: `[D]`, the next slot that gets what arrives for slot d, or -1.
      send_begin, recv_begin: `[R + 1]`, where the slots to each rank, and from each, begin.
      most: `[1]`, the slots that go from any rank to any other, at most.
      send_slots, recv_slots: `[N]`, slots that leave, and those they come to, in the order in which they leave.
    """

    source: Any
    next: Any
    send_begin: Any
    recv_begin: Any
    most: Any
    send_slots: Any
    recv_slots: Any

    def pack(self) -> np.ndarray:
        """As one array, in the order of the fields, which ffi/common/ops.h knows too."""
        return np.concatenate(self, axis=-1, dtype=np.int32)

    @staticmethod
    def unpack(packed, num_ranks: int, num_slots: int) -> TransferTables:
        sizes = [num_slots, num_slots, num_ranks + 1, num_ranks + 1, 1]
        moved = (packed.shape[-1] - sum(sizes)) // 2
        ends = np.cumsum([0, *sizes, moved, moved])
        return TransferTables(*(packed[..., begin:end] for begin, end in itertools.pairwise(ends)))


@jax.named_scope("jax_ep.transfer")
def transfer(spec, source, tables, num_slots: int):
    """`source` [S, W] of any dtype, packed `tables` [n] -> [D, W], D = `num_slots`. Not differentiable."""
    if spec.is_reference:
        return _reference.transfer(spec, source, TransferTables.unpack(tables, spec.shape.num_ranks, num_slots))
    return _ffi.transfer(spec, source, tables, num_slots)
