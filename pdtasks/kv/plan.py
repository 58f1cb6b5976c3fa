"""What does one engine step ask of the transfer side, and what came of it?

`TransferPlan` travels from the scheduler's process to each worker rank with every step,
`TransferRecord`s travel back with the step's statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from pdtasks.kv.handle import KVHandle


@dataclass(frozen=True, kw_only=True)
class BlockSave:
    """Blocks of one request that are complete after this step."""

    request_id: str  #: the engine's name of the request
    handle: KVHandle
    first: int  #: index in the prompt of the first block
    block_ids: list[int]  #: where the blocks lie in the engine's cache
    last: bool  #: nothing more of this request follows
    numbered_from: int | None = None  #: the first block's number in the engine's ring

    def number(self, index: int) -> int | None:
        """Of block `index` of the prompt in the engine's ring."""
        return None if self.numbered_from is None else self.numbered_from + index - self.first


class Join(Enum):
    """When may the request of a load be in a step?"""

    THERE = auto()  #: once all blocks are there
    SOON = auto()  #: while the last ones come: the step that has it first waits for them
    NOW = auto()  #: the step that the load begins with has it, and waits


@dataclass(frozen=True, kw_only=True)
class BlockLoad:
    """Blocks to bring in before the request can run."""

    request_id: str
    handle: KVHandle
    first: int
    block_ids: list[int]
    join: Join = Join.THERE

    def number(self, index: int) -> int | None:
        """Of block `index` of the prompt in the ring that the handle names."""
        return self.handle.number(index)


@dataclass
class TransferPlan(KVConnectorMetadata):
    """The saves and loads of one engine step."""

    saves: list[BlockSave] = field(default_factory=list)
    loads: list[BlockLoad] = field(default_factory=list)
    #: Finished requests whose blocks stay until they are saved; False: nobody wants them saved.
    finished: dict[str, bool] = field(default_factory=dict)
    #: Requests whose blocks vLLM takes away before this step.
    preempted: set[str] = field(default_factory=set)
    #: Requests of `Join.SOON` whose blocks this step may read.
    joined: set[str] = field(default_factory=set)
    #: Requests of `Join.SOON` that have ended before, whose blocks this step may write.
    left: set[str] = field(default_factory=set)
    #: Blocks of the engine's cache that this step, or one of its loads, begins to write.
    written: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TransferRecord:
    """What one rank moved for one request."""

    request_id: str
    op: str  #: ``"save"`` or ``"load"``
    rank: int
    world: int  #: ranks that will each report
    blocks: int  #: blocks moved, or found to be in the store already
    bytes: int  #: bytes that were moved: into the ring or the store, out of either
    missing: int = 0  #: blocks that the store did not have, or not intact
    seconds: float = 0.0  #: from the step that asked until done
    error: str = ""  #: why it failed; empty when it did not


_NOTHING: Final[dict[str, Any]] = {"records": (), "unsent": 0}


class TransferStats(KVConnectorStats):
    """Carries `TransferRecord`s through vLLM's scheduler statistics.

    And `unsent`: how many blocks the store did not get meanwhile.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=_NOTHING | (data or {}))
        self.data["records"] = list(self.data["records"])

    def reset(self) -> None:
        self.data = _NOTHING | {"records": []}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data["records"].extend(other.data["records"])
        self.data["unsent"] += other.data["unsent"]
        return self

    def reduce(self) -> dict[str, int | float]:
        records = self.data["records"]
        return {
            f"{op}_{unit}": sum(r[unit] for r in records if r["op"] == op)
            for op in ("save", "load")
            for unit in ("blocks", "bytes", "missing")
        }

    def is_empty(self) -> bool:
        return not (self.data["records"] or self.data["unsent"])
