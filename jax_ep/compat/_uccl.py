"""UCCL-EP's `Buffer`, by the name and with the arguments of NeMo's `UCCLBuffer`."""

from __future__ import annotations

from typing import NoReturn

from jax_ep import _bootstrap
from jax_ep.communicator import MoECommunicator
from jax_ep.compat._arguments import refuse
from jax_ep.compat._deepep import Buffer, Group


class UCCLBuffer(Buffer):
    """As `Buffer`, for programs that use UCCL-EP.

    That all ranks share a host is found out rather than believed: processes connect to each other when the Buffer is
    built. So build it on all of them. No network transport is needed then, and none is there.

    Args:
      num_rdma_bytes: accepted; the attribute is 0.
      is_intranode: accepted; the attribute is True. Only with `implementation="reference"`, which goes through XLA's
        collectives, it is what was given if there are several processes.
      group, and all others: as for `Buffer`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `Buffer`.
      RuntimeError: ranks are on different hosts, or do not reach each other; the text says which and why.
    """

    def __init__(
        self,
        group: Group,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        is_intranode: bool = False,
        *,
        max_tokens_per_rank: int | None = None,
        max_requests: int = 0,
        implementation: str | None = None,
        timeout_s: float = 30.0,
    ):
        super().__init__(
            group,
            num_nvl_bytes,
            0,
            low_latency_mode,
            num_qps_per_rank,
            allow_nvlink_for_low_latency_mode,
            allow_mnnvl,
            explicitly_destroy,
            max_tokens_per_rank=max_tokens_per_rank,
            max_requests=max_requests,
            implementation=implementation,
            timeout_s=timeout_s,
        )
        self.is_intranode = self._shares_a_host() or is_intranode

    def _shares_a_host(self) -> bool:
        """By a communicator of the smallest size, which only ranks of one host can build."""
        groups = _bootstrap.groups_of(self.mesh, self.axis_name)
        if all(len({device.process_index for device in group}) == 1 for group in groups):
            return True
        sizes = dict(num_experts=self.group_size, hidden_size=8, topk=1, max_tokens_per_rank=1)
        with MoECommunicator(self.mesh, **sizes, **self._options) as communicator:
            return communicator.config.implementation != "reference"

    def reset_rdma_buffer(self) -> None:
        """Does nothing: there is no such buffer."""

    def connect_atomic_buffer(self, proxy) -> NoReturn:
        refuse("connect_atomic_buffer", "there are no proxies, since there is no network transport")
