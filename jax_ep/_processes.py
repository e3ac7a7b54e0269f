"""Processes that tell each other things, in the key-value store of `jax.distributed`: the only file that touches it."""

from __future__ import annotations

import collections
import hashlib
import json
import time
from typing import Any

import jax
from jax._src import distributed

_KEY = "jax_ep"
_PARTING_TIMEOUT_S = 10.0
# Of errors that are told to others: each as the first that it is one of.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (TypeError, ValueError, NotImplementedError, RuntimeError)
}
# The store is not made for large values.
_CHUNK_BYTES = 1 << 20

# How many communicators this process made over the same devices: equal in all their processes.
_made = collections.Counter[str]()
# Of `Processes`, by name and process: how many shares began and ended; and keys that others may still be reading.
_shares = collections.Counter[str]()
_left = collections.defaultdict[tuple[int, ...], list[str]](list)


def communicator_id(mesh: jax.sharding.Mesh, axis_name: str) -> int:
    """A number that names a new communicator in all its processes, and no other in any of them."""
    identity = _identity(mesh, axis_name)
    _made[identity] += 1
    digest = hashlib.sha256(f"{identity} {_made[identity]}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def give_back_id(mesh: jax.sharding.Mesh, axis_name: str) -> None:
    """The last one of `communicator_id`, which other processes did not come to use."""
    _made[_identity(mesh, axis_name)] -= 1


def _identity(mesh: jax.sharding.Mesh, axis_name: str) -> str:
    return f"{[device.id for device in mesh.devices.flat]} {mesh.devices.shape} {mesh.axis_names} {axis_name}"


class Processes:
    """Processes that tell each other bytes: all call its methods in the same order.

    Every wait ends: with what was waited for, or with an error on all processes, `timeout_s` and up to a second later,
    since the service looks for barriers that are late once a second.

    Args:
      all: their indices.
      me: the index of this one.
      client: of the key-value store; not used by a process alone.
      name: equal in all of them. One that was used before goes on where it ended.
      timeout_s: for each wait.
    """

    def __init__(self, all: list[int], me: int, client: Any, name: str, timeout_s: float):
        self.all, self._me, self._client = all, me, client
        self._prefix = f"{_KEY}/{name}"
        self._mine = f"{self._prefix}/{me}"
        self._timeout_s = timeout_s
        self._round = 0

    @staticmethod
    def of(mesh: jax.sharding.Mesh, id: int, timeout_s: float) -> Processes:
        """Those of a mesh; `id` as from `communicator_id`."""
        all = sorted({device.process_index for device in mesh.devices.flat})
        return Processes(all, jax.process_index(), distributed.global_state.client, str(id), timeout_s)

    def share(self, what: str, mine: bytes, problem: Exception | None = None) -> dict[int, bytes]:
        """What each process calls it with, once all have.

        Args:
          what: the name of the call.
          mine: what this process has to tell.
          problem: what keeps it from going on, which all raise then.

        Raises:
          RuntimeError: not all of them called it within the timeout; on all that did.
          ValueError: they are in different calls; on all.
        """
        if self.all == [self._me]:
            if problem is not None:
                raise problem
            return {self._me: mine}
        kind = next((name for name, kind in _KINDS.items() if isinstance(problem, kind)), "RuntimeError")
        head = json.dumps([what, None if problem is None else [kind, str(problem) or type(problem).__name__]]).encode()
        parts = {process: said.split(b"\n", 1) for process, said in self._all_said(what, head + b"\n" + mine).items()}
        self._check_heads({process: json.loads(head) for process, (head, _) in parts.items()}, problem)
        return {process: text for process, (_, text) in parts.items()}

    def _check_heads(self, heads: dict[int, tuple[str, list[str] | None]], mine: Exception | None) -> None:
        first = self.all[0]
        for process, (what, _) in heads.items():
            if what != heads[first][0]:
                raise ValueError(f"processes {first} and {process} are in different calls: {heads[first][0]}, {what}")
        problems = {process: problem for process, (_, problem) in heads.items() if problem is not None}
        if problems:
            process, (kind, text) = next(iter(problems.items()))
            where = "" if len(problems) == len(heads) else f", on process {process}"
            raise _KINDS[kind](f"{text}{where}") from mine

    def _all_said(self, what: str, mine: bytes) -> dict[int, bytes]:
        """What each process has to say, once all are here.

        Processes meet at barriers with numbers, and each goes through the numbers in their order. A barrier ends in one
        way for all: also for one that comes after others gave up, which thereupon finds them at the next. So those that
        wait, wait at the same, however often some of them called and gave up before.
        """
        client, deadline = self._client, time.monotonic() + self._timeout_s
        while True:
            number = _shares[self._mine]
            # Nobody reads what was said two barriers ago: all have come to the last one.
            place = f"{self._prefix}/said/{number % 2}"
            client.key_value_set_bytes(f"{place}/{self._me}", b"%d\n" % number + mine, allow_overwrite=True)
            milliseconds = max(1, int(1000 * (deadline - time.monotonic())))
            try:
                client.wait_at_barrier(f"{self._prefix}/{number}", milliseconds, process_ids=self.all)
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() >= deadline:
                    raise self._not_all(what) from error
            finally:
                _shares[self._mine], self._round = number + 1, 0
        said = dict(client.key_value_dir_get_bytes(place))
        numbered = [said.get(f"{place}/{process}", b"").partition(b"\n") for process in self.all]
        if any(their != b"%d" % number for their, _, _ in numbered):
            raise self._not_all(what)  # this process was stopped for so long that others went on and gave up
        while left := _left[tuple(self.all)]:
            client.key_value_delete(left.pop())  # all are here, so nobody is reading what closed ones said
        return {process: text for process, (_, _, text) in zip(self.all, numbered, strict=True)}

    def _not_all(self, what: str) -> RuntimeError:
        return RuntimeError(f"{what}: not all of processes {self.all} called it within timeout_s={self._timeout_s}")

    def part(self) -> None:
        """Returns once all are here, or have stopped answering."""
        client = distributed.global_state.client
        if len(self.all) == 1 or client is None:
            return
        try:
            milliseconds = int(1000 * _PARTING_TIMEOUT_S)
            client.wait_at_barrier(f"{self._prefix}/parted", milliseconds, process_ids=self.all)
        except jax.errors.JaxRuntimeError:
            pass

    def close(self) -> None:
        if _shares.pop(self._mine, 0):
            _left[tuple(self.all)] += [f"{self._prefix}/said/{i}/{self._me}" for i in (0, 1)]

    def agree(self, what: str, mine: str, problem: Exception | None = None) -> None:
        """Raises ValueError, on all processes, unless all call it with the same text. `problem` as in `share`."""
        theirs = self.share(what, mine.encode(), problem)
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
        client, me, milliseconds = self._client, self._me, int(self._timeout_s * 1000)
        self._round += 1  # of the last share, so that one that failed in between is in step again
        place = f"{self._prefix}/{_shares[self._mine]}/{self._round}"
        for process, data in outgoing.items():
            for i, begin in enumerate(range(0, len(data), _CHUNK_BYTES)):
                client.key_value_set_bytes(f"{place}/{me}/{process}/{i}", data[begin : begin + _CHUNK_BYTES])
        try:
            received = {
                process: b"".join(
                    client.blocking_key_value_get_bytes(f"{place}/{process}/{me}/{i}", milliseconds)
                    for i in range(-(-size // _CHUNK_BYTES))
                )
                for process, size in sizes.items()
            }
            client.wait_at_barrier(f"{place}/read", milliseconds, process_ids=self.all)
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(f"{what}: not all bytes of a round came within timeout_s={self._timeout_s}") from error
        finally:
            client.key_value_delete(f"{place}/{me}")  # with all below it
        return received
