from collections.abc import Sequence

class MoEShape:
    def __init__(
        self,
        *,
        num_ranks: int,
        num_experts: int,
        topk: int,
        hidden_size: int,
        max_tokens_per_rank: int,
        expert_alignment: int,
        capacity: int,
        layout: int,
        dtype: int,
        drop_overflow: bool,
        low_latency: bool,
    ) -> None: ...
    def route_tables_size(self, arg: int, /) -> int: ...

class CommunicatorSpec:
    def __init__(
        self,
        *,
        id: int,
        shape: MoEShape,
        groups: Sequence[Sequence[tuple[int, int]]],
        process: int,
        timeout_s: float,
        num_sms: int,
        dispatch_blocks: tuple[int, int],
        combine_blocks: tuple[int, int],
        max_requests: int,
    ) -> None: ...

def registrations() -> dict: ...
def types() -> dict: ...

class Communicator:
    def __init__(self, spec: CommunicatorSpec, across_processes: bool) -> None: ...
    def handle(self) -> bytes: ...
    def connect(self, process: int, handle: bytes) -> None: ...
    def disconnect(self) -> None: ...
    @property
    def arena_bytes(self) -> int: ...
    def take_error(self) -> tuple[int, int, int, int, str]: ...
    def destroy(self) -> None: ...
