"""What does the bus know of a batch? Which lines wait, which run, and what became of the others.

    pd:batch:<id>           the record
    pd:batch:<id>:lines     a list: number, place in the input file, custom_id of each that waits
    pd:batch:<id>:running   the same of each that runs, by the end of its lease
    pd:batch:<id>:held      by number: the token of the runner that has it
    pd:batch:<id>:tries     by number: how often it was begun

A line becomes work only when a runner has room for it, so that ten thousand of them are ten
thousand short entries of a list and a handful of requests.  Its outcome is appended to the output
file by the script that takes it from `running`: only the holder of its lease can do that, and only
once.  What is beyond its lines (checking, ending) is done by one process at a time, which *tends*
the batch.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Literal

import valkey.asyncio

from pdtasks.bus import keys
from pdtasks.bus.records import Records, Unreadable, of_a_kind
from pdtasks.bus.scripts import MOST_MEMORY, flat, script
from pdtasks.errors import NoRoomForBatches
from pdtasks.messages import Count

logger = logging.getLogger(__name__)

#: Seconds without a renewal after which a line, or the care for a batch, is somebody else's.
LEASE_S: Final = 10.0
#: Runners that may lose one line; then it has failed.
MAX_TRIES: Final = 3
#: Batches that have not ended, of all keys together.
_MOST_OPEN: Final = 200
#: Lines that one script ends: the bus answers nobody else meanwhile.
_DROPPED_AT_ONCE: Final = 200


class Status(StrEnum):
    """As OpenAI names them."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


_TIMES: Final = (
    *("created_at", "expires_at", "in_progress_at", "finalizing_at", "completed_at"),
    *("failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)
_JSON: Final = frozenset((*_TIMES, "total", "completed", "failed", "errors", "metadata"))


class FileGone(Exception):
    """A batch's input file is not there."""


@dataclass(frozen=True)
class Batch:
    """One batch as the bus has it."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status
    created_at: Count
    expires_at: Count  #: of the window: what has not begun by then is not begun
    owner: str = ""  #: the name of the API key that it came with
    metadata: dict[str, str] | None = None
    total: Count = 0
    completed: Count = 0
    failed: Count = 0
    model: str | None = None
    errors: list[dict[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: Count | None = None
    finalizing_at: Count | None = None
    completed_at: Count | None = None
    failed_at: Count | None = None
    expired_at: Count | None = None
    cancelling_at: Count | None = None
    cancelled_at: Count | None = None
    request_prefix: str = ""  #: of what its lines are called; a number follows
    token: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        """Of its record."""
        return keys.BATCH + self.id


@dataclass(frozen=True)
class Place:
    """One line of an input file."""

    number: Count  #: from 1
    offset: Count
    length: Count
    custom_id: str

    def entry(self) -> str:
        """As the bus has it."""
        places = [self.number, self.offset, self.length, self.custom_id]
        return json.dumps(places, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Line:
    """A line that this process runs."""

    batch: Batch
    place: Place
    entry: str
    tries: int
    token: str = field(repr=False)

    @property
    def request_id(self) -> str:
        """What its outcome is called."""
        return f"{self.batch.request_prefix}{self.place.number}"


class BatchStore:
    """All batches on one bus. Every method raises what is in `bus.connection.BUS_ERRORS`."""

    def __init__(
        self, bus: valkey.asyncio.Valkey, *, ttl_s: int, window_s: int = 24 * 3600
    ) -> None:
        """Args:
        ttl_s: seconds that a batch that has ended, and its files, can be asked for.
        window_s: seconds that a batch has to be done.
        """
        self._bus = bus
        self._ttl_s = ttl_s
        self._window_s = window_s
        self._records = Records(
            bus,
            Batch,
            key=lambda batch_id: keys.BATCH + batch_id,
            is_id=is_batch_id,
            json_fields=_JSON,
        )
        self._create = script(bus, "batch_create")
        self._tend = script(bus, "batch_tend")
        self._write = script(bus, "batch_write")
        self._drop = script(bus, "batch_common", "batch_drop")
        self._end = script(bus, "batch_end")
        self._cancel = script(bus, "batch_cancel")
        self._claim = script(bus, "line_claim")
        self._renew = script(bus, "line_renew")
        self._release = script(bus, "line_release")
        self._finish = script(bus, "batch_common", "line_finish")

    # -- callers ---------------------------------------------------------------------------------

    async def create(
        self,
        endpoint: str,
        input_file_id: str,
        *,
        metadata: Mapping[str, str] | None = None,
        owner: str = "",
    ) -> Batch:
        """Take a batch in. Raises FileGone, NoRoomForBatches."""
        name = uuid.uuid4().hex
        now = int(time.time())
        fields: dict[str, Any] = {
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": "24h",
            "status": Status.VALIDATING,
            "created_at": now,
            "expires_at": now + self._window_s,
            "owner": owner,
            "request_prefix": f"batch_req_{name}_",
            "output_id": f"file-{uuid.uuid4().hex}",
            "error_id": f"file-{uuid.uuid4().hex}",
        }
        if metadata is not None:
            fields["metadata"] = dict(metadata)
        batch_id = f"batch_{name}"
        with of_a_kind():
            taken: bytes = await self._create(
                keys=[
                    *(keys.BATCH + batch_id, keys.BATCHES, keys.BATCHES_OPEN),
                    keys.FILE + input_file_id,
                ],
                args=[
                    *(keys.BATCH, batch_id, self._window_s + self._ttl_s, _MOST_OPEN),
                    *(MOST_MEMORY, *flat(fields)),
                ],
            )
        if taken == b"file":
            raise FileGone
        if taken == b"batches":
            raise NoRoomForBatches(f"{_MOST_OPEN} batches have not ended yet: come again later")
        if taken == b"memory":
            raise NoRoomForBatches(
                "jobs, files and results fill the bus: come again when some have expired, or give "
                "the bus more memory",
                retry_after_s=60,
            )
        batch = await self.get(batch_id)
        assert batch is not None
        return batch

    async def get(self, batch_id: str) -> Batch | None:
        """The batch, or None when there is none (any more). Raises Unreadable."""
        return await self._records.get(batch_id)

    async def newest(
        self, *, limit: int, after: str | None, owner: str = ""
    ) -> tuple[list[Batch], bool] | None:
        """Batches, newest first, and whether there are more; None: there is no batch `after`."""
        return await self._records.page(keys.BATCHES, limit=limit, after=after, owner=owner)

    async def cancel(self, batch_id: str) -> None:
        """Have a batch ended; one that has ended stays as it is."""
        await self._cancel(keys=[keys.BATCH + batch_id])

    # -- who tends a batch -----------------------------------------------------------------------

    async def tend(self, token: str) -> Batch | None:
        """A batch that needs to be checked or ended, and nobody else's for a lease; or None."""
        batch_id: bytes | None = await self._tend(
            keys=[keys.BATCHES_OPEN], args=[keys.BATCH, token, LEASE_S]
        )
        return None if batch_id is None else await self._open_one(batch_id.decode())

    async def _open_one(self, batch_id: str) -> Batch | None:
        try:
            return await self.get(batch_id)
        except Unreadable as exc:
            # It would be given out again and again.
            logger.error("%s cannot be read and is left: %s", batch_id, exc)  # noqa: TRY400
            await self._bus.zrem(keys.BATCHES_OPEN, batch_id)
            return None

    async def write(
        self,
        batch: Batch,
        places: Sequence[Place] = (),
        *,
        anew: bool = False,
        lease_s: float = LEASE_S,
        **fields: Any,
    ) -> bool:
        """Hold `batch` for `lease_s` more, add lines that wait, set fields.

        Args:
            anew: forget the lines that were added before.

        Returns False when it is somebody else's, or has another status than in `batch`.
        """
        entries = [place.entry() for place in places]
        done = await self._write(
            keys=[batch.key, f"{batch.key}:lines"],
            args=[
                *(batch.token, batch.status, lease_s, "1" if anew else "0"),
                *(len(fields), *flat(fields), *entries),
            ],
        )
        return bool(done)

    async def drop_lines(self, batch: Batch, code: str, message: str) -> int:
        """End some lines that nobody runs with this error; returns how many, -1: it is not ours."""
        dropped: int = await self._drop(
            keys=[batch.key, *_behind(batch)],
            args=[keys.FILE, batch.token, LEASE_S, _DROPPED_AT_ONCE, code, message],
        )
        return dropped

    async def end(self, batch: Batch, status: Status) -> bool:
        """End `batch`, show its files. False: it has lines, or is somebody else's."""
        fields = {"status": status, f"{status}_at": int(time.time())}
        done = await self._end(
            keys=[batch.key, keys.BATCHES_OPEN, keys.FILES, keys.FILE + batch.input_file_id],
            args=[batch.id, batch.token, self._ttl_s, keys.FILE, *flat(fields)],
        )
        return bool(done)

    # -- who runs lines --------------------------------------------------------------------------

    async def claim(self, token: str, away: Collection[str] = ()) -> Line | None:
        """Begin to run a line that nobody runs; None: there is none, or others go first.

        Args:
            token: new for each claim.
            away: models that nobody serves now; lines that ask them wait.
        """
        found = await self._claim(
            keys=[keys.BATCHES_OPEN],
            args=[
                *(keys.BATCH, token, LEASE_S, MOST_MEMORY, keys.JOBS_WAITING),
                json.dumps(list(away)),
            ],
        )
        if found is None:
            return None
        batch_id, entry, tries = found[0].decode(), found[1].decode(), int(found[2])
        batch = await self._open_one(batch_id)
        if batch is None:
            return None
        return Line(batch, Place(*json.loads(entry)), entry, tries, token)

    async def renew(self, line: Line) -> Literal["held", "lost", "late", "cancel"]:
        """Hold `line` for a lease more, and hear whether it is still wanted."""
        held: bytes = await self._renew(
            keys=[line.batch.key, *_behind(line.batch)[1:3]],
            args=[line.entry, line.place.number, line.token, LEASE_S],
        )
        return held.decode()  # type: ignore[return-value]  # one of the four

    async def release(self, line: Line) -> None:
        """Hand `line` over to the next that claims."""
        await self._release(
            keys=_behind(line.batch)[1:], args=[line.entry, line.place.number, line.token]
        )

    async def finish(
        self, line: Line, which: Literal["output", "error"], text: str
    ) -> Literal["refused", "written", "last"]:
        """Append the outcome of `line` to a file, unless it is somebody else's, or has ended.

        "last": now its batch has none any more.
        """
        done: int = await self._finish(
            keys=[line.batch.key, *_behind(line.batch)[1:]],
            args=[keys.FILE, line.entry, line.place.number, line.token, which, text],
        )
        return "refused" if done == 0 else "last" if done == 2 else "written"


def is_batch_id(text: str) -> bool:
    """Could a batch be called so?"""
    return re.fullmatch(r"batch_[0-9a-f]{32}", text) is not None


def _behind(batch: Batch) -> list[str]:
    return [f"{batch.key}:{what}" for what in ("lines", "running", "held", "tries")]
