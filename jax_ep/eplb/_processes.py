"""What processes tell each other before and while slots move, through the key-value store of `jax.distributed`.

Every wait ends: with what was waited for, or within `timeout_s` with an error on all processes.
"""

from __future__ import annotations

from typing import Any

import jax

from jax_ep import _bootstrap

# The store is not made for large values.
_CHUNK_BYTES = 1 << 20


class Processes:
    """The processes of a mesh, which call its methods in the same order.

    Args:
      mesh: whose processes.
      id: equal in all of them, see `_bootstrap.communicator_id`.
      timeout_s: for each wait.
    """

    def __init__(self, mesh: jax.sharding.Mesh, id: int, timeout_s: float):
        self.all = sorted({device.process_index for device in mesh.devices.flat})
        self._prefix = f"{_bootstrap._KEY}/eplb/{id}"
        self._timeout_s = timeout_s
        self._step = self._round = 0

    @property
    def _client(self) -> Any:
        return _bootstrap.distributed.global_state.client

    @property
    def _milliseconds(self) -> int:
        return int(self._timeout_s * 1000)

    def share(self, what: str, mine: bytes) -> dict[int, bytes]:
        """What each process calls it with, once all have.

        Raises:
          RuntimeError: not all of them called it within the timeout; on all that did.
        """
        me = jax.process_index()
        if self.all == [me]:
            return {me: mine}
        self._step, self._round = self._step + 1, 0
        client, step = self._client, f"{self._prefix}/{self._step}"
        client.key_value_set_bytes(f"{step}/{me}", mine)
        try:
            theirs = {
                process: client.blocking_key_value_get_bytes(f"{step}/{process}", self._milliseconds)
                for process in self.all
            }
            # Nobody may go on while another gives up.
            client.wait_at_barrier(f"{step}/shared", self._milliseconds, process_ids=self.all)
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(
                f"{what}: not all of processes {self.all} called it within timeout_s={self._timeout_s}"
            ) from error
        finally:
            client.key_value_delete(f"{step}/{me}")
        return theirs

    def agree(self, what: str, mine: str) -> None:
        """Raises ValueError, on all processes, unless all call it with the same text."""
        theirs = self.share(what, mine.encode())
        for process, text in theirs.items():
            if text != theirs[self.all[0]]:
                raise ValueError(
                    f"{what}: processes {self.all[0]} and {process} were given different arguments: "
                    f"{theirs[self.all[0]].decode()} and {text.decode()}"
                )

    def exchange(self, what: str, outgoing: dict[int, bytes], sizes: dict[int, int]) -> dict[int, bytes]:
        """Sends each process its bytes, and returns what each sent here, of the given sizes.

        Raises:
          RuntimeError: something did not come within the timeout; on all processes.
        """
        client, me = self._client, jax.process_index()
        self._round += 1  # of the step, so that one that failed in between is in step again
        step = f"{self._prefix}/{self._step}/{self._round}"
        for process, data in outgoing.items():
            for i, begin in enumerate(range(0, len(data), _CHUNK_BYTES)):
                client.key_value_set_bytes(f"{step}/{me}/{process}/{i}", data[begin : begin + _CHUNK_BYTES])
        try:
            received = {
                process: b"".join(
                    client.blocking_key_value_get_bytes(f"{step}/{process}/{me}/{i}", self._milliseconds)
                    for i in range(-(-size // _CHUNK_BYTES))
                )
                for process, size in sizes.items()
            }
            client.wait_at_barrier(f"{step}/read", self._milliseconds, process_ids=self.all)
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(f"{what}: not all bytes of a round came within timeout_s={self._timeout_s}") from error
        finally:
            for process, data in outgoing.items():
                for i in range(-(-len(data) // _CHUNK_BYTES)):
                    client.key_value_delete(f"{step}/{me}/{process}/{i}")
        return received
