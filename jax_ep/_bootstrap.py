"""From a mesh to connected groups: who takes part, how they reach each other's memory, and the end of it."""

from __future__ import annotations

import json
import os
import pathlib

import jax
import numpy as np

from jax_ep import _ffi
from jax_ep._processes import Processes
from jax_ep._shapes import MoEShape
from jax_ep._version import __version__
from jax_ep.types import MoEMode


def groups_of(mesh: jax.sharding.Mesh, axis_name: str) -> list[list[jax.Device]]:
    """The devices along `axis_name`, one list per position on the mesh's other axes."""
    axis = mesh.axis_names.index(axis_name)
    return np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis]).tolist()


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
      RuntimeError: a process does not come, disagrees about the configuration, or cannot reach what it has to; on all.
    """

    def __init__(self, mesh, config, *, id: int, shape: MoEShape):
        self._groups = groups_of(mesh, config.axis_name)
        self._processes = Processes.of(mesh, id, config.timeout_s)
        self.native, handle, problem = None, b"", None
        try:
            self.native = self._disconnected(config, id, shape)
            if len(self._processes.all) > 1:
                handle = self.native.handle()
        except Exception as error:
            problem = error
        try:
            theirs = self._told_by_all(f"jax_ep {__version__} {config}", handle, problem)
            self._connect_to_all(theirs)
        except BaseException:
            if self.native is not None:
                self.native.destroy()
            raise

    def _disconnected(self, config, id: int, shape: MoEShape):
        extension = _ffi.extension(config.implementation)
        self.native_shape = extension.MoEShape(
            num_ranks=shape.num_ranks,
            num_experts=shape.num_experts,
            topk=shape.topk,
            hidden_size=shape.hidden_size,
            max_tokens_per_rank=shape.max_tokens_per_rank,
            expert_alignment=shape.expert_alignment,
            capacity=shape.capacity,
            layout=_ffi.LAYOUTS[shape.layout],
            dtype=_ffi.DTYPES[config.dtype.name],
            drop_overflow=config.overflow == "drop",
            low_latency=config.mode is MoEMode.LOW_LATENCY,
        )
        spec = extension.CommunicatorSpec(
            id=id,
            shape=self.native_shape,
            groups=[[(device.process_index, ordinal(device)) for device in group] for group in self._groups],
            process=jax.process_index(),
            timeout_s=config.timeout_s,
            num_sms=config.num_sms or 0,
            dispatch_blocks=config.dispatch_blocks or (0, 0),
            combine_blocks=config.combine_blocks or (0, 0),
            max_requests=config.max_requests,
        )
        return extension.Communicator(spec, across_processes=len(self._processes.all) > 1)

    def _told_by_all(self, configuration: str, handle: bytes, problem: Exception | None) -> dict[int, dict]:
        """What the others have to know of each process, once all have the same configuration."""
        mine = dict(configuration=configuration, host=host_identity(), pid=os.getpid(), handle=handle.hex())
        told = self._processes.share("MoECommunicator", json.dumps(mine).encode(), problem)
        theirs = {process: json.loads(text) for process, text in told.items()}
        for process, their in theirs.items():
            _check_agreement(self._groups, jax.process_index(), mine, process, their)
        return theirs

    def _connect_to_all(self, theirs: dict[int, dict]) -> None:
        me, problem = jax.process_index(), None
        try:
            neighbours = _neighbours(self._groups, me)
            for process in neighbours:
                _check_host(self._groups, me, theirs[me], process, theirs[process])
            for process in neighbours:
                _connect(self.native, self._groups, me, process, theirs[process])
        except RuntimeError as error:
            problem = error
        # Nobody may go on, or leave, before all have opened what they need.
        self._processes.share("MoECommunicator, connected", b"", problem)

    def close(self) -> None:
        """Frees everything, once no process uses another's memory any more, or has stopped answering."""
        self.native.disconnect()
        self._processes.part()  # a process that died cannot use our memory either
        self._processes.close()
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
