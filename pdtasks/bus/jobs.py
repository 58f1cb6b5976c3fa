"""What does the bus know of a job? A request that outlives the connection it came on.

A job is run by one API process at a time, its *runner*, under a lease.  When the runner dies, the
lease runs out and another one takes the job over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Literal

import valkey.asyncio

from pdtasks.bus import keys
from pdtasks.bus.job_scripts import JobScripts, events_key, record_key
from pdtasks.bus.records import Records, Unreadable, of_a_kind
from pdtasks.messages import Count, UnixTime
from pdtasks.tracing import NO_TRACE

logger = logging.getLogger(__name__)

#: Seconds without a renewal after which a job is somebody else's.
LEASE_S = 10.0
#: Runners that may lose one job, each with a whole run; then it fails.  One that stops and hands
#: the job over has not lost it.
MAX_ATTEMPTS = 3


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: Fields of a record that are written as JSON; the others are words.
_JSON: Final = frozenset(
    {"body", "attempts", "created_at", "deadline", "first_token_at", "finished_at"}
    | {"stages", "result", "error", "trace"}
)
#: What a list is made of: neither bodies nor results, which may be long.
_LISTED: Final = (
    *("path", "state", "attempts", "created_at", "deadline", "first_token_at", "finished_at"),
    *("stages", "error", "model", "owner", "given_up", "cancel"),
)
_ENDS: Final = {State.SUCCEEDED, State.FAILED, State.CANCELLED}
#: What may follow.  A run that was lost begins again, and an answer may end in any stage.
NEXT: Final[Mapping[State, set[State]]] = {
    State.QUEUED: {State.PREFILL, State.DECODE, *_ENDS},
    State.PREFILL: {State.PREFILL, State.DECODE, *_ENDS},
    State.DECODE: {State.PREFILL, State.DECODE, *_ENDS},
    State.SUCCEEDED: set(),
    State.FAILED: set(),
    State.CANCELLED: set(),
}


class KeyReused(Exception):
    """An Idempotency-Key came again with another body."""


class UnreadableJob(Unreadable):
    """Under a job's name lies what no runner has written."""


@dataclass(frozen=True)
class StageStart:
    """A worker began a stage of the job."""

    stage: str
    worker: str
    at: UnixTime
    route: str = ""  #: the request's, see `pdtasks.overview.RequestView`


@dataclass(frozen=True)
class Job:
    """One job as the bus has it."""

    id: str
    path: str  #: the route that its body is for
    body: dict[str, Any]
    state: State
    attempts: Count  #: runners that have begun it
    created_at: UnixTime
    deadline: UnixTime
    ttl_s: float
    first_token_at: UnixTime | None = None
    finished_at: UnixTime | None = None
    stages: tuple[StageStart, ...] = ()
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    is_given_up: bool = False  #: `MAX_ATTEMPTS` runners have lost it
    is_unwanted: bool = False  #: somebody has cancelled it
    token: str = field(default="", repr=False)
    owner: str = ""  #: the name of the API key that it came with
    model: str | None = None
    trace: dict[str, str] = field(default_factory=dict)  #: headers of its submission's trace

    @property
    def ended(self) -> bool:
        """Will it not change any more?"""
        return not NEXT[self.state]


@dataclass(frozen=True)
class Event:
    """One thing to read along; `data` is None in the last one."""

    id: str
    data: str | None


class JobStore:
    """All jobs on one bus. Every method raises what is in `pdtasks.bus.connection.BUS_ERRORS`."""

    def __init__(
        self, bus: valkey.asyncio.Valkey, *, ttl_s: float, most_waiting: int = 100_000
    ) -> None:
        """Args:
        ttl_s: seconds that a finished job can be asked for.
        most_waiting: jobs that nobody runs yet; more are not taken.
        """
        self._bus = bus
        self._ttl_s = ttl_s
        self._most_waiting = most_waiting
        self._scripts = JobScripts(bus)
        self._records = Records(
            bus,
            Job,
            key=record_key,
            is_id=is_job_id,
            json_fields=_JSON,
            more=lambda found: {
                "ttl_s": ttl_s,
                "is_given_up": "given_up" in found,
                "is_unwanted": "cancel" in found,
            },
            error=UnreadableJob,
            listed=_LISTED,
            unlisted={"body": {}},
        )

    # -- callers ---------------------------------------------------------------------------------

    async def create(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        seed: int | None = None,
        idempotency_key: str | None = None,
        meaning: Mapping[str, Any] | None = None,
        owner: str = "",
        trace: Mapping[str, str] = NO_TRACE,
    ) -> Job:
        """Take a job in; the same key and meaning give the job they gave before.

        Args:
            path: the route that `body` is for.
            timeout_s: seconds until the job is given up.
            seed: for a body that names none, so that a second runner finds the same tokens.
            meaning: what has to be the same under one key; None: path and body as they are.
            owner: whose job it is; an idempotency key is his alone.
            trace: headers of the trace that it is part of.

        Raises KeyReused when the key came with another meaning, NoRoomForJobs when too many wait or
        the bus is nearly full, UnreadableJob as `get` does.
        """
        now = time.time()
        job_id = f"job-{uuid.uuid4().hex}"
        # With n > 1 vLLM derives each choice's seed from it.
        wire = json.dumps({**body, "seed": seed} if body.get("seed") is None else body)
        same = {"path": path, "body": body} if meaning is None else meaning
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        fields: dict[str, Any] = {
            "path": path,
            "body": wire,
            "state": State.QUEUED,
            "attempts": 0,
            "created_at": now,
            "deadline": now + timeout_s,
            "owner": owner,
        }
        if isinstance(model := body.get("model"), str):
            fields["model"] = model
        if trace:
            fields["trace"] = json.dumps(dict(trace))
        key = None
        if idempotency_key is not None:
            own = f"{owner}:{idempotency_key}" if owner else idempotency_key
            key = hashlib.sha256(own.encode()).hexdigest()
        known_digest, known_id = await self._scripts.create(
            job_id,
            fields,
            owner=owner,
            digest=digest,
            key=key,
            ttl_s=int(timeout_s + self._ttl_s),
            most_waiting=self._most_waiting,
        )
        if known_digest != digest:
            raise KeyReused
        job = await self.get(known_id)
        if job is None:  # it has expired between the two commands
            return await self.create(
                path,
                body,
                timeout_s=timeout_s,
                seed=seed,
                idempotency_key=idempotency_key,
                meaning=meaning,
                owner=owner,
                trace=trace,
            )
        return job

    async def get(self, job_id: str) -> Job | None:
        """The job, or None when there is none (any more). Raises UnreadableJob."""
        return await self._records.get(job_id)

    async def newest(
        self, *, limit: int, after: str | None, owner: str = ""
    ) -> tuple[list[Job], bool] | None:
        """Jobs without body and result, newest first, and whether there are more.

        Args:
            after: begin behind this job.
            owner: leave out the jobs of others; empty: all.

        Returns None when there is no job `after` (any more).
        """
        return await self._records.page(keys.JOBS, limit=limit, after=after, owner=owner)

    async def counts(self) -> tuple[int, int]:
        """How many wait, and how many run, of all owners."""
        async with self._bus.pipeline(transaction=False) as pipe:
            pipe.zcard(keys.JOBS_WAITING)
            pipe.zcard(keys.JOBS_RUNNING)
            waiting, running = await pipe.execute()
        return int(waiting), int(running)

    async def events(
        self, job_id: str, *, after: str, block_s: float, limit: int = 256
    ) -> list[Event]:
        """What came after the event `after` ("0": all); waits for it up to `block_s` seconds.

        Raises UnreadableJob.
        """
        with of_a_kind(UnreadableJob):
            found = await self._bus.xread(
                {events_key(job_id): after}, count=limit, block=int(block_s * 1000)
            )
        try:
            return [
                Event(entry_id.decode(), None if b"end" in fields else fields[b"d"].decode())
                for _, entries in found or ()
                for entry_id, fields in entries
            ]
        except (KeyError, UnicodeDecodeError) as exc:
            raise UnreadableJob(f"its events: {type(exc).__name__}") from None

    async def cancel(self, job_id: str) -> bool:
        """Ask for the end of a job. True: nobody runs it and it has ended; else its runner will."""
        nobody = ""  # a job that waits has no runner, hence no token
        if await self._end(job_id, nobody, State.CANCELLED):
            return True
        await self._scripts.cancel(job_id)
        return False

    # -- runners ---------------------------------------------------------------------------------

    async def claim(self, token: str) -> Job | None:
        """Begin to run a job that nobody runs; None when there is none.

        Owners have turns, and of one owner's jobs the oldest is the next.

        One that `is_given_up`, or `is_unwanted`, or whose deadline has passed, is only to be ended.
        `token` must be new for each claim.
        """
        while job_id := await self._scripts.claim(
            token, lease_s=LEASE_S, most_attempts=MAX_ATTEMPTS
        ):
            try:
                return await self.get(job_id)
            except UnreadableJob as exc:
                # It would be claimed again and again, and hold up what is behind it.
                logger.error("%s cannot be read and ends: %s", job_id, exc)  # noqa: TRY400
                error = {"message": "the record of this job cannot be read", "code": 500}
                await self._end(job_id, token, State.FAILED, error=error)
        return None

    async def renew(self, job: Job) -> Literal["held", "lost", "cancel"]:
        """Hold `job` for `LEASE_S` more seconds, and hear whether it is still wanted."""
        return await self._scripts.renew(job.id, job.token, lease_s=LEASE_S)

    async def write(self, job: Job, event: str | None = None, **fields: Any) -> bool:
        """Append `event`, set `fields` of the record. False: the job is somebody else's now."""
        return await self._scripts.write(job.id, job.token, event, fields)

    async def release(self, job: Job) -> None:
        """Hand `job` over to the next that claims; it counts as no lost attempt."""
        await self._scripts.release(job.id, job.token)

    async def finish(self, job: Job, state: State, **fields: Any) -> bool:
        """End `job`. False: it is somebody else's now."""
        return await self._end(job.id, job.token, state, **fields)

    async def _end(self, job_id: str, token: str, state: State, **fields: Any) -> bool:
        fields |= {"state": state, "finished_at": time.time()}
        return await self._scripts.finish(job_id, token, fields, ttl_s=int(self._ttl_s))


def is_job_id(text: str) -> bool:
    """Could a job be called so?"""
    return re.fullmatch(r"job-[0-9a-f]{32}", text) is not None


def is_event_id(text: str) -> bool:
    """Could an event be called so? Two numbers of 64 bits, as Valkey's streams have them."""
    parts = text.split("-")
    return len(parts) == 2 and all(
        part.isascii() and part.isdecimal() and len(part) <= 20 and int(part) < 2**64
        for part in parts
    )
