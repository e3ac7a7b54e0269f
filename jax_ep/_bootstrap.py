"""From a mesh to connected groups: who takes part, how they reach each other's memory, and the end of it.

The only file that touches the key-value store of `jax.distributed`.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax._src import distributed

from jax_ep import _ffi
from jax_ep._version import __version__

_KEY = "jax_ep"
_TEARDOWN_TIMEOUT_S = 10.0
# The store is not made for large values.
_CHUNK_BYTES = 1 << 20

# How many communicators this process made over the same devices: equal in all their processes.
_made = collections.Counter[str]()


def groups_of(mesh: jax.sharding.Mesh, axis_name: str) -> list[list[jax.Device]]:
    """The devices along `axis_name`, one list per position on the mesh's other axes."""
    axis = mesh.axis_names.index(axis_name)
    return np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis]).tolist()


def communicator_id(mesh: jax.sharding.Mesh, axis_name: str) -> int:
    """A number that names a new communicator in all its processes, and no other in any of them."""
    identity = f"{[device.id for device in mesh.devices.flat]} {mesh.devices.shape} {mesh.axis_names} {axis_name}"
    _made[identity] += 1
    digest = hashlib.sha256(f"{identity} {_made[identity]}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def host_identity() -> str:
    """Equal in two processes only if they can reach each other's memory through the kernel."""
    boot_id = pathlib.Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else os.uname().nodename
    pid_namespace = pathlib.Path("/proc/self/ns/pid")
    return f"{boot} {os.readlink(pid_namespace) if pid_namespace.is_symlink() else ''}"


def ordinal(device: jax.Device) -> int:
    """What XLA's DeviceOrdinal says inside a handler: the global id on CPU, the process's own number on GPU, which
    only that process knows."""
    if device.platform == "cpu":
        return device.id
    return device.local_hardware_id if device.process_index == jax.process_index() else -1


class Connection:
    """The native communicators of this process's devices, connected to those of all others.

    Raises:
      RuntimeError: a process disagrees about the configuration, or two ranks cannot reach each other.
    """

    def __init__(self, mesh, config, *, id: int, native_shape):
        extension = _ffi.extension(config.implementation)
        groups = groups_of(mesh, config.axis_name)
        self._id = id
        self._timeout_s = config.timeout_s
        self._processes = sorted({device.process_index for group in groups for device in group})
        spec = extension.CommunicatorSpec(
            id=id,
            shape=native_shape,
            groups=[[(device.process_index, ordinal(device)) for device in group] for group in groups],
            process=jax.process_index(),
            timeout_s=config.timeout_s,
            num_sms=config.num_sms or 0,
            dispatch_blocks=config.dispatch_blocks or (0, 0),
            combine_blocks=config.combine_blocks or (0, 0),
            max_requests=config.max_requests,
        )
        self.native = extension.Communicator(spec, across_processes=len(self._processes) > 1)
        try:
            if len(self._processes) > 1:
                self._exchange(groups, f"jax_ep {__version__} {config}")
        except BaseException:
            self.native.destroy()
            raise

    def _exchange(self, groups, configuration: str) -> None:
        me = jax.process_index()
        mine = dict(
            configuration=configuration, host=host_identity(), pid=os.getpid(), handle=self.native.handle().hex()
        )
        client = distributed.global_state.client
        milliseconds = int(self._timeout_s * 1000)
        client.key_value_set_bytes(f"{_KEY}/{self._id}/{me}", json.dumps(mine).encode())
        try:
            theirs = {
                process: json.loads(client.blocking_key_value_get_bytes(f"{_KEY}/{self._id}/{process}", milliseconds))
                for process in self._processes
            }
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(
                f"MoECommunicator: not all of processes {self._processes} built it within timeout_s={self._timeout_s}"
            ) from error
        for process, their in theirs.items():
            _check_agreement(groups, me, mine, process, their)
        neighbours = _neighbours(groups, me)
        for process in neighbours:
            _check_host(groups, me, mine, process, theirs[process])
        try:
            for process in neighbours:
                _connect(self.native, groups, me, process, theirs[process])
        finally:
            # Nobody may go on, or leave, before all have opened what they need. After it the keys serve no one.
            self._barrier("connected", self._timeout_s)
            client.key_value_delete(f"{_KEY}/{self._id}/{me}")

    def _barrier(self, name: str, timeout_s: float) -> None:
        distributed.global_state.client.wait_at_barrier(
            f"{_KEY}/{self._id}/{name}", int(timeout_s * 1000), process_ids=self._processes
        )

    def close(self) -> None:
        """Frees everything, once no process uses another's memory any more, or has stopped answering."""
        self.native.disconnect()
        if len(self._processes) > 1 and distributed.global_state.client is not None:
            try:
                self._barrier("disconnected", _TEARDOWN_TIMEOUT_S)
            except jax.errors.JaxRuntimeError:
                pass  # A process that died cannot use our memory either.
        self.native.destroy()


def _neighbours(groups, me: int) -> list[int]:
    """The other processes that share a group with this one."""
    shared = [group for group in groups if any(device.process_index == me for device in group)]
    return sorted({device.process_index for group in shared for device in group} - {me})


def _ranks(groups, process: int) -> list[int]:
    return sorted({rank for group in groups for rank, device in enumerate(group) if device.process_index == process})


def _names(groups, me: int, process: int) -> str:
    return f"ranks {_ranks(groups, me)} (process {me}) and ranks {_ranks(groups, process)} (process {process})"


def _check_agreement(groups, me: int, mine: dict, process: int, their: dict) -> None:
    if mine["configuration"] != their["configuration"]:
        raise RuntimeError(
            f"MoECommunicator: {_names(groups, me, process)} were given different arguments: "
            f"{mine['configuration']} and {their['configuration']}"
        )


def _check_host(groups, me: int, mine: dict, process: int, their: dict) -> None:
    if mine["host"] != their["host"]:
        raise RuntimeError(
            f"MoECommunicator: nothing connects {_names(groups, me, process)}: they run on different hosts, or in "
            f"different process namespaces ({mine['host']} and {their['host']}). Choose a mesh axis within one host, "
            'or implementation="reference".'
        )


def _connect(native, groups, me: int, process: int, their: dict) -> None:
    try:
        native.connect(process, bytes.fromhex(their["handle"]))
    except RuntimeError as error:
        raise RuntimeError(
            f"MoECommunicator: nothing connects {_names(groups, me, process)}, pid {their['pid']}: {error}"
        ) from error


class Processes:
    """The processes of a mesh, which tell each other bytes: all call its methods in the same order.

    Every wait ends: with what was waited for, or within `timeout_s` with an error on all processes.

    Args:
      mesh: whose processes.
      id: equal in all of them, see `communicator_id`.
      timeout_s: for each wait.
    """

    def __init__(self, mesh: jax.sharding.Mesh, id: int, timeout_s: float):
        self.all = sorted({device.process_index for device in mesh.devices.flat})
        self._prefix = f"{_KEY}/eplb/{id}"
        self._timeout_s = timeout_s
        self._step = self._round = 0

    @property
    def _client(self) -> Any:
        return distributed.global_state.client

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
