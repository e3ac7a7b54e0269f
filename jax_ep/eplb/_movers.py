"""What fills the slots of a sharded array as a plan says, and how it is told."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep.eplb._plan import TransferPlan


@dataclasses.dataclass
class TransferStatistics:
    """What a transfer did.

    Attributes:
      num_rounds: exchanges between the ranks.
      bytes_moved: int64 `[R, R]`, the payload by source and destination rank, along each line of the mesh's axis; what
        stays on its rank is on the diagonal.
    """

    num_rounds: int
    bytes_moved: np.ndarray

    @property
    def bytes_over_links(self) -> int:
        """The payload that left its rank, of all ranks."""
        return int(self.bytes_moved.sum() - np.trace(self.bytes_moved))


class Mover(abc.ABC):
    """One way to fill slots; `row_bytes` is the size of the rows that slots travel as."""

    name: str
    row_bytes: int

    @abc.abstractmethod
    def fill(self, source: jax.Array, plan: TransferPlan, num_slot_dims: int) -> tuple[jax.Array, int]:
        """An array of new slots, sharded like `source`, whose first dimensions are those of slots; and the rounds."""

    def check(self) -> None:  # noqa: B027
        """Raises what went wrong in fills that are done."""

    def close(self) -> None:  # noqa: B027
        """Frees what it holds."""


def named_sharding(array: jax.Array) -> Any:
    """Of an array that has one: mesh and spec."""
    return array.sharding


def filled_shape(shape: tuple[int, ...], num_slots: int, num_slot_dims: int) -> tuple[int, ...]:
    """Of a device's part with `num_slots` slots, of that of its source."""
    outer = shape[: num_slot_dims - 1]
    return (*outer, num_slots // math.prod(outer), *shape[num_slot_dims:])


def placed(table: np.ndarray, mesh: jax.sharding.Mesh, *spec: str) -> jax.Array:
    """Split by `spec`, without asking other processes, as `device_put` would, whether theirs is the same."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(table.shape, sharding, lambda index: table[index])
