"""What has been moved for each request so far, and who is told when all of it has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm.logger import init_logger

from pdtasks.kv.plan import TransferRecord
from pdtasks.kv.store import StoreError

logger = init_logger(__name__)


class Late(Exception):
    """The deadline of a transfer has passed before its turn came."""


@dataclass(eq=False)
class Tally:
    """What has been moved for one request so far."""

    request_id: str
    op: str
    started: float = field(default_factory=time.monotonic)
    open: int = 0  # blocks on their way
    copying: int = 0  # blocks that a thread is copying out of the cache, or into it
    blocks: int = 0
    bytes: int = 0
    missing: int = 0
    error: str = ""
    sealed: bool = False  # no further blocks will be added
    cancelled: bool = False  # nobody wants the rest
    told: bool = False  # the engine has been told that it is done, or nearly

    def note(self, moved: int | None, error: Exception | None = None) -> None:
        """One block's way has ended: with so many bytes, or None: it was not moved."""
        self.open -= 1
        if error is not None:
            self.error = self.error or describe(error)
        if moved is not None:
            self.blocks += 1
            self.bytes += moved


class Ledger:
    """The records of one rank. For any thread; `lock` guards all tallies too."""

    def __init__(
        self, rank: int, world: int, report: Callable[[TransferRecord], bool] | None = None
    ) -> None:
        """`report` tells whoever waits at once; False: it could not, and `take` will have it."""
        self.lock = threading.Lock()
        self._rank = rank
        self._world = world
        self._report = report
        self._ended: list[TransferRecord] = []
        self._left: list[TransferRecord] = []

    def record(self, tally: Tally) -> None:
        """All of `tally` has moved, or will not. Called with the lock; `tell` follows without."""
        self._ended.append(
            TransferRecord(
                request_id=tally.request_id,
                op=tally.op,
                rank=self._rank,
                world=self._world,
                blocks=tally.blocks,
                bytes=tally.bytes,
                missing=tally.missing,
                seconds=time.monotonic() - tally.started,
                error=tally.error,
            )
        )

    def tell(self) -> None:
        """Report and log what was recorded; without the lock: the engine's thread takes it."""
        if not self._ended:
            return
        with self.lock:
            ended, self._ended = self._ended, []
        left = [r for r in ended if self._report is None or not self._report(r)]
        with self.lock:
            self._left += left
        for record in ended:
            if record.error:
                logger.warning("KV %s of %s: %s", record.op, record.request_id, record.error)

    def take(self) -> list[TransferRecord]:
        """What nobody was told at once, since the last call."""
        with self.lock:
            left, self._left = self._left, []
        return left


def keep(deadline: float) -> None:
    """Raises Late when `deadline` (monotonic) has passed."""
    if time.monotonic() >= deadline:
        raise Late


def describe(error: Exception) -> str:
    """Why a transfer failed, in one line."""
    if isinstance(error, Late):
        return "store: too slow: the deadline passed before all blocks had moved"
    kind = "store" if isinstance(error, StoreError) else "transfer"
    return f"{kind}: {type(error).__name__}: {error}"[:200]
