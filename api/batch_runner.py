"""How are batches run? Line by line, by vLLM's own handlers, in any API process that has room.

Behind jobs: a line is begun while no job waits, and as many run at once as the setting says.  What
a batch needs beside its lines, its check and its end, one process does at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Final, Literal

from fastapi import FastAPI

from api.asking import (
    WHOLE,
    Failed,
    NotNow,
    Refused,
    ask,
    whole_body,
    without_what_is_ours,
)
from api.batch_checking import InputFile
from api.claiming import Claims
from api.parameters import Refusal
from api.service_class import ServiceClass, serving
from api.tracing import tracer_of, tracing
from pdtasks.background import Background
from pdtasks.bus.batches import MAX_TRIES, Batch, BatchStore, Line, Place, Status
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.files import FileStore
from pdtasks.bus.records import Unreadable
from pdtasks.errors import (
    BrokerUnavailable,
    NoWorker,
    RepliesLost,
    TooManyRequests,
    WorkerLost,
    where,
)
from pdtasks.keys import asking_for

logger = logging.getLogger(__name__)

#: Seconds before a line that the stack has no room for, or has lost, is asked again.
_RETRY_S: Final = 1.0
#: What happens to whatever request is asked just then: such a line waits for better times.
_NOT_ITS_OWN: Final = (NoWorker, TooManyRequests, BrokerUnavailable, RepliesLost)
#: Times that a line is asked that fails for another reason of the stack: it may be what kills
#: the engines.
_MOST_ASKED: Final = 3
#: Seconds that an outcome is kept while the bus is away; then the line is run again.
_KEPT_S: Final = 60.0
#: Batches that one process tends at once.
_TENDED: Final = 2
#: Lines that are added at once: the bus answers nobody else meanwhile.
_ADDED_AT_ONCE: Final = 500
#: Seconds until a batch is looked at again whose lines are still ending.
_ENDING_S: Final = 0.5

_EXPIRED: Final = (
    "batch_expired",
    "This request could not be executed before the completion window expired.",
)
_CANCELLED: Final = (
    "batch_cancelled",
    "This batch was cancelled before this request was executed.",
)

#: To which file, and what.
_Outcome = tuple[Literal["output", "error"], dict[str, Any]]


class _NobodyThere(Exception):
    """No worker serves the model that a line asks."""


class LineRunner(Claims):
    """Runs lines of batches in this process, at most `concurrency` at once."""

    def __init__(
        self,
        app: FastAPI,
        store: BatchStore,
        files: FileStore,
        *,
        refuse: Callable[[str, Mapping[str, Any]], Refusal | None],
        away: Callable[[], Collection[str]],
        concurrency: int,
        background: Background,
    ) -> None:
        """Args:
        refuse: which parameter of a body for a path is refused, and why.
        away: models that no worker serves now.
        """
        super().__init__("batch-lines", concurrency=concurrency, background=background)
        #: Called when a batch has no line any more.
        self.on_last: Callable[[], None] = lambda: None
        self._app = app
        self._store = store
        self._files = files
        self._refuse = refuse
        self._away = away

    async def _claim(self) -> tuple[str, Coroutine[Any, Any, None]] | None:
        line = await self._store.claim(uuid.uuid4().hex, self._away())
        return None if line is None else (line.request_id, self._run(line))

    async def _run(self, line: Line) -> None:
        if self.is_stopping:
            await self._store.release(line)
            return
        if line.tries > MAX_TRIES:
            lost = WorkerLost("every API process that began this request was lost")
            await self._finish(line, _http(line, lost.http_status, str(lost), lost.code))
            return
        work = asyncio.create_task(self._outcome(line), name=f"work on {line.request_id}")
        verdict = await self._watch(work, lambda: self._store.renew(line))
        if verdict == "done":
            try:
                await self._finish(line, work.result())
            except _NobodyThere:
                # Its place is for lines of models that are served.
                await self._store.release(line)
            except BUS_ERRORS as exc:
                # The lease runs out, then it is run again, unless its outcome was written.
                logger.warning("%s is left, bus is away: %s", line.request_id, type(exc).__name__)
        elif verdict == "stopping":
            await self._store.release(line)
        elif verdict in ("late", "cancel"):
            code, message = _EXPIRED if verdict == "late" else _CANCELLED
            error = {"code": code, "message": message}
            await self._finish(line, ("error", {"response": None, "error": error}))

    async def _finish(self, line: Line, outcome: _Outcome) -> None:
        which, told = outcome
        head = {"id": line.request_id, "custom_id": line.place.custom_id}
        text = json.dumps(head | told, separators=(",", ":")) + "\n"
        until = time.monotonic() + _KEPT_S
        while True:
            try:
                done = await self._store.finish(line, which, text)
            except BUS_ERRORS:
                # Asked twice it is written once.
                if self.is_stopping or time.monotonic() > until:
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                if done == "last":
                    self.on_last()
                return

    async def _outcome(self, line: Line) -> _Outcome:
        try:
            # Each is a trace of its own: a batch may have tens of thousands.
            attributes = {"pdtasks.batch.id": line.batch.id}
            with (
                tracing(tracer_of(self._app), "batch line", time.time(), attributes),
                serving(ServiceClass.BATCH),
                asking_for(line.batch.owner),
            ):
                return _answered(line, 200, await self._answer(line))
        except Refused as exc:
            return _http(line, exc.status, exc.message, "BadRequestError", exc.param)
        except Failed as exc:
            return _answered(line, int(exc.error.get("code") or 500), {"error": exc.error})
        except (*BUS_ERRORS, _NobodyThere):
            raise
        except Unreadable as exc:
            error = {"code": "input_lost", "message": f"the input file: {exc}"}
            return "error", {"response": None, "error": error}
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is this line's alone
            logger.error("%s failed: %s", line.request_id, where(exc))  # noqa: TRY400 - no prompts
            message = f"an unforeseen {type(exc).__name__} ended the request"
            return _http(line, 500, message, "PdtasksError")

    async def _answer(self, line: Line) -> dict[str, Any]:
        batch, place = line.batch, line.place
        text = await self._files.read(batch.input_file_id, place.offset, place.length)
        body = without_what_is_ours(json.loads(text)["body"])
        if (refusal := self._refuse(batch.endpoint, body)) is not None:
            raise Refused(400, refusal.message, refusal.param)
        if body.get("background"):
            raise Refused(400, "a batch is in the background already", "background")
        num_asked = 0
        while True:
            try:
                found = await ask(self._app, batch.endpoint, body, WHOLE, line.request_id)
                return whole_body(found)
            except NotNow as exc:
                if isinstance(exc.cause, NoWorker) and batch.model in self._away():
                    raise _NobodyThere from exc
                num_asked += not isinstance(exc.cause, _NOT_ITS_OWN)
                if num_asked >= _MOST_ASKED:
                    raise Failed(exc.error) from exc
            except Failed as exc:
                # It may have waited behind others all that time.
                num_asked += 1
                if exc.error.get("code") != 504 or num_asked >= _MOST_ASKED:
                    raise
            await asyncio.sleep(_RETRY_S)


def _answered(line: Line, status: int, body: dict[str, Any]) -> _Outcome:
    response = {"status_code": status, "request_id": line.request_id, "body": body}
    return ("output" if status == 200 else "error"), {"response": response, "error": None}


def _http(line: Line, status: int, message: str, kind: str, param: str | None = None) -> _Outcome:
    error = {"message": message, "type": kind, "param": param, "code": status}
    return _answered(line, status, {"error": error})


class BatchTender(Claims):
    """Checks and ends batches in this process."""

    def __init__(
        self,
        store: BatchStore,
        files: FileStore,
        lines: LineRunner,
        *,
        models: Collection[str],
        max_line_bytes: int,
        background: Background,
    ) -> None:
        """Args:
        lines: is told of new ones.
        models: that are served.
        max_line_bytes: of one request.
        """
        super().__init__("batch-tender", concurrency=_TENDED, background=background)
        self._store = store
        self._files = files
        self._lines = lines
        lines.on_last = self.wake
        self._models = models
        self._max_line_bytes = max_line_bytes

    async def _claim(self) -> tuple[str, Coroutine[Any, Any, None]] | None:
        batch = await self._store.tend(uuid.uuid4().hex)
        return None if batch is None else (batch.id, self._tend(batch))

    async def _tend(self, batch: Batch) -> None:
        try:
            await self._do_next(batch)
        except BUS_ERRORS as exc:
            logger.warning("%s waits, bus is away: %s", batch.id, type(exc).__name__)

    async def _do_next(self, batch: Batch) -> None:
        if batch.status == Status.VALIDATING:
            await self._check(batch)
        elif batch.status == Status.CANCELLING:
            await self._end_early(batch, Status.CANCELLED, *_CANCELLED)
        elif batch.status == Status.FINALIZING:
            await self._store.end(batch, Status.COMPLETED)
        elif time.time() >= batch.expires_at and batch.completed < batch.total:
            await self._end_early(batch, Status.EXPIRED, *_EXPIRED)
        else:
            now = int(time.time())
            if await self._store.write(batch, status=Status.FINALIZING, finalizing_at=now):
                await self._store.end(batch, Status.COMPLETED)

    async def _end_early(self, batch: Batch, status: Status, code: str, message: str) -> None:
        while (dropped := await self._store.drop_lines(batch, code, message)) > 0:
            pass
        if dropped == 0 and not await self._store.end(batch, status):
            # Those that run are ended by who runs them.
            await self._store.write(batch, lease_s=_ENDING_S)

    async def _check(self, batch: Batch) -> None:
        file = await self._files.get(batch.input_file_id)
        if file is None or not await self._store.write(batch, anew=True):
            return
        found = InputFile(batch.endpoint, self._models, max_line_bytes=self._max_line_bytes)
        async for piece in self._files.pieces(file):
            if self.is_stopping:
                await self._store.write(batch, lease_s=0)
                return
            if not await self._add(batch, found.feed(piece)):
                return
            if found.is_hopeless:
                break
        if not await self._add(batch, found.end()):
            return
        if found.errors:
            logger.info("%s has failed: %d errors in its file", batch.id, len(found.errors))
            if await self._store.write(batch, anew=True, errors=found.errors):
                await self._store.end(batch, Status.FAILED)
            return
        logger.info("%s begins: %d lines", batch.id, found.num_lines)
        await self._store.write(
            batch,
            lease_s=0,
            status=Status.IN_PROGRESS,
            in_progress_at=int(time.time()),
            total=found.num_lines,
            model=found.model,
        )
        self._lines.wake()

    async def _add(self, batch: Batch, places: Sequence[Place]) -> bool:
        """False: it is somebody else's, or nobody's any more."""
        for start in range(0, max(len(places), 1), _ADDED_AT_ONCE):
            if not await self._store.write(batch, places[start : start + _ADDED_AT_ONCE]):
                return False
        return True
