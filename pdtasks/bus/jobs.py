"""What does the bus know of a job? A request that outlives the connection it came on.

A job is run by one API process at a time, its *runner*, under a lease.  When the runner dies, the
lease runs out and another one takes the job over.  All changes are scripts in the server: each is
done whole or not at all, and one that is made by a runner counts only as long as it holds the
lease (`token`), so a runner that was frozen cannot write into its successor's work.

Keys: `pd:job:<id>` the record, `pd:job:<id>:events` what its caller may read along,
`pd:jobs` all jobs by time, `pd:jobs:waiting` by time, `pd:jobs:running` by end of the lease,
`pd:jobs:key:<digest>` an Idempotency-Key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast, get_args

import valkey.asyncio

from pdtasks.errors import where

logger = logging.getLogger(__name__)

#: Seconds without a renewal after which a job is somebody else's.
LEASE_S = 10.0
#: Runners that may lose one job, each with a whole run; then it fails.  One that stops and hands
#: the job over has not lost it.
MAX_ATTEMPTS = 3

Ended = Literal["succeeded", "failed", "cancelled"]
State = Literal["queued", "prefill", "decode", Ended]
ENDED: Final[tuple[Ended, ...]] = get_args(Ended)

_PREFIX = "pd:job:"
_ALL = "pd:jobs"
_RUNNING = "pd:jobs:running"
_WAITING = "pd:jobs:waiting"
_IDEMPOTENCY = "pd:jobs:key:"
#: Names of expired jobs that one submission forgets.
_FORGOTTEN_AT_ONCE = 10

#: What the scripts share.  `keep`: an index lives as long as the longest of its records.
_COMMON = (
    f"local prefix = '{_PREFIX}' local has_ended = {{}} "
    + " ".join(f"has_ended['{state}'] = true" for state in ENDED)
    + """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local function keep(index, record)
  local left = redis.call('PTTL', record)
  redis.call('PEXPIRE', index, left, 'NX')
  redis.call('PEXPIRE', index, left, 'GT')
end
"""
)
#: KEYS: record, idempotency or "", all, waiting. ARGV: id, digest, ttl, names to forget at most,
#: field, value, …
_CREATE = """
if KEYS[2] ~= '' then
  local known = redis.call('GET', KEYS[2])
  -- A job that ends early expires before its key.
  if known and redis.call('EXISTS', prefix .. string.match(known, ' (.*)')) == 1 then
    return known
  end
  redis.call('SET', KEYS[2], ARGV[2] .. ' ' .. ARGV[1], 'EX', ARGV[3])
end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[3], now, ARGV[1])
redis.call('ZADD', KEYS[4], now, ARGV[1])
keep(KEYS[3], KEYS[1])
keep(KEYS[4], KEYS[1])
for _, id in ipairs(redis.call('ZRANGE', KEYS[3], 0, ARGV[4] - 1)) do
  if redis.call('EXISTS', prefix .. id) == 1 then break end
  redis.call('ZREM', KEYS[3], id)
  redis.call('ZREM', KEYS[4], id)
end
return ARGV[2] .. ' ' .. ARGV[1]
"""
#: KEYS: running, waiting. ARGV: token, lease, attempts at most.
_CLAIM = """
while true do
  local id = redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
  if not id then id = redis.call('ZPOPMIN', KEYS[2])[1] end
  if not id then return nil end
  local record = prefix .. id
  if redis.call('EXISTS', record) == 1 then
    redis.call('ZADD', KEYS[1], now + ARGV[2], id)
    keep(KEYS[1], record)
    redis.call('HSET', record, 'token', ARGV[1])
    local begun = tonumber(redis.call('HGET', record, 'attempts'))
    local handed_over = tonumber(redis.call('HGET', record, 'handed_over') or 0)
    if begun - handed_over < tonumber(ARGV[3]) then
      redis.call('HINCRBY', record, 'attempts', 1)
    else
      redis.call('HSET', record, 'given_up', '1')
    end
    return id
  end
  redis.call('ZREM', KEYS[1], id)
end
"""
#: KEYS: record, running. ARGV: token, lease, id. Returns 0: lost, 1: held, 2: cancel.
_RENEW = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[3])
keep(KEYS[2], KEYS[1])
return redis.call('HGET', KEYS[1], 'cancel') and 2 or 1
"""
#: KEYS: record, events. ARGV: token, event or "", field, value, …
_WRITE = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
if ARGV[2] ~= '' then
  redis.call('XADD', KEYS[2], '*', 'd', ARGV[2])
  if redis.call('TTL', KEYS[2]) < 0 then
    redis.call('EXPIRE', KEYS[2], redis.call('TTL', KEYS[1]))
  end
end
if #ARGV > 2 then redis.call('HSET', KEYS[1], unpack(ARGV, 3)) end
return 1
"""
#: KEYS: record, events, running, waiting, all. ARGV: token or "" for a job nobody runs, id,
#: ttl, field, value, …
_FINISH = """
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 0 end
if (redis.call('HGET', KEYS[1], 'token') or '') ~= ARGV[1] then return 0 end
if has_ended[state] then return 1 end
redis.call('HSET', KEYS[1], 'token', '', unpack(ARGV, 4))
redis.call('XADD', KEYS[2], '*', 'end', redis.call('HGET', KEYS[1], 'state'))
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('ZREM', KEYS[4], ARGV[2])
keep(KEYS[5], KEYS[1])
return 1
"""
#: KEYS: record.
_CANCEL = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'cancel', '1') end
"""
#: KEYS: record, running. ARGV: token, id.
_RELEASE = """
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'token', '-')
  redis.call('HINCRBY', KEYS[1], 'handed_over', 1)
  redis.call('ZADD', KEYS[2], 0, ARGV[2])
  keep(KEYS[2], KEYS[1])
end
"""


class KeyReused(Exception):
    """An Idempotency-Key came again with another body."""


@dataclass(frozen=True)
class StageStart:
    """A worker began a stage of the job."""

    stage: str
    worker: str
    at: float  #: UNIX seconds


@dataclass(frozen=True)
class Job:
    """One job as the bus has it."""

    id: str
    path: str  #: the route that its body is for
    body: dict[str, Any]
    state: State
    attempts: int  #: runners that have begun it
    created_at: float  #: UNIX seconds, as all times here
    deadline: float
    ttl_s: float
    first_token_at: float | None = None
    finished_at: float | None = None
    stages: tuple[StageStart, ...] = ()
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    is_given_up: bool = False  #: `MAX_ATTEMPTS` runners have lost it
    is_unwanted: bool = False  #: somebody has cancelled it
    token: str = field(default="", repr=False)

    @property
    def ended(self) -> bool:
        """Will it not change any more?"""
        return self.state in ENDED


@dataclass(frozen=True)
class Event:
    """One thing to read along; `data` is None in the last one."""

    id: str
    data: str | None


class JobStore:
    """All jobs on one bus. Every method raises what is in `pdtasks.bus.connection.BUS_ERRORS`."""

    def __init__(self, bus: valkey.asyncio.Valkey, *, ttl_s: float) -> None:
        """`ttl_s`: seconds that a finished job can be asked for."""
        self._bus = bus
        self._ttl_s = ttl_s
        self._create, self._claim, self._renew, self._write = (
            bus.register_script(_COMMON + script) for script in (_CREATE, _CLAIM, _RENEW, _WRITE)
        )
        self._finish, self._cancel, self._release = (
            bus.register_script(_COMMON + script) for script in (_FINISH, _CANCEL, _RELEASE)
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
    ) -> Job:
        """Take a job in; the same key and meaning give the job they gave before.

        Args:
            path: the route that `body` is for.
            timeout_s: seconds until the job is given up.
            seed: for a body that names none, so that a second runner finds the same tokens.
            meaning: what has to be the same under one key; None: path and body as they are.

        Raises KeyReused when the key came with another meaning.
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
            "state": "queued",
            "attempts": 0,
            "created_at": now,
            "deadline": now + timeout_s,
        }
        key = ""
        if idempotency_key is not None:
            named = hashlib.sha256(idempotency_key.encode()).hexdigest()
            key = f"{_IDEMPOTENCY}{named}"
        known = await self._create(
            keys=[_record(job_id), key, _ALL, _WAITING],
            args=[
                *(job_id, digest, int(timeout_s + self._ttl_s), _FORGOTTEN_AT_ONCE),
                *_flat(fields),
            ],
        )
        known_digest, known_id = known.decode().split()
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
            )
        return job

    async def get(self, job_id: str) -> Job | None:
        """The job, or None when there is none (any more)."""
        found = await cast("Awaitable[dict[bytes, bytes]]", self._bus.hgetall(_record(job_id)))
        return _read(job_id, {k.decode(): v for k, v in found.items()}, self._ttl_s)

    async def newest(self, *, limit: int, after: str | None) -> tuple[list[Job], bool] | None:
        """Jobs, newest first, and whether there are more.

        Args:
            after: begin behind this job.

        Returns None when there is no job `after` (any more).
        """
        start = 0
        if after is not None:
            rank = await self._bus.zrevrank(_ALL, after)
            if rank is None:
                return None
            start = rank + 1
        found: list[Job] = []
        while len(found) <= limit:
            page = await self._bus.zrevrange(_ALL, start, start + limit)
            if not page:
                break
            gone = []
            for name in page:
                try:
                    job = await self.get(name.decode())
                except (KeyError, TypeError, ValueError) as exc:
                    # One record that cannot be read does not hide the others.
                    logger.error("%s cannot be listed: %s", name.decode(), where(exc))  # noqa: TRY400
                    continue
                if job is None:
                    gone.append(name)
                else:
                    found.append(job)
            if gone:
                await self._bus.zrem(_ALL, *gone)
            start += len(page) - len(gone)
        return found[:limit], len(found) > limit

    async def events(
        self, job_id: str, *, after: str, block_s: float, limit: int = 256
    ) -> list[Event]:
        """What came after the event `after` ("0": all); waits for it up to `block_s` seconds."""
        key = _record(job_id) + ":events"
        found = await self._bus.xread({key: after}, count=limit, block=int(block_s * 1000))
        return [
            Event(entry_id.decode(), None if b"end" in fields else fields[b"d"].decode())
            for _, entries in found or ()
            for entry_id, fields in entries
        ]

    async def cancel(self, job_id: str) -> bool:
        """Ask for the end of a job. True: nobody runs it and it has ended; else its runner will."""
        if await self._end(job_id, "", state="cancelled", finished_at=time.time()):
            return True
        await self._cancel(keys=[_record(job_id)])
        return False

    # -- runners ---------------------------------------------------------------------------------

    async def claim(self, token: str) -> Job | None:
        """Begin to run the oldest job that nobody runs; None when there is none.

        One that `is_given_up`, or `is_unwanted`, or whose deadline has passed, is only to be ended.
        `token` must be new for each claim.
        """
        while name := await self._claim(
            keys=[_RUNNING, _WAITING], args=[token, LEASE_S, MAX_ATTEMPTS]
        ):
            job_id = name.decode()
            try:
                return await self.get(job_id)
            except (KeyError, TypeError, ValueError) as exc:
                # It would be claimed again and again, and hold up what is behind it.
                logger.error("%s cannot be read and ends: %s", job_id, where(exc))  # noqa: TRY400
                error = {"message": "the record of this job cannot be read", "code": 500}
                await self._end(job_id, token, state="failed", error=error, finished_at=time.time())
        return None

    async def renew(self, job: Job) -> Literal["held", "lost", "cancel"]:
        """Hold `job` for `LEASE_S` more seconds, and hear whether it is still wanted."""
        answer: int = await self._renew(
            keys=[_record(job.id), _RUNNING], args=[job.token, LEASE_S, job.id]
        )
        found: Literal["held", "lost", "cancel"] = ("lost", "held", "cancel")[answer]
        return found

    async def write(self, job: Job, event: str | None = None, **fields: Any) -> bool:
        """Append `event`, set `fields` of the record. False: the job is somebody else's now."""
        done = await self._write(
            keys=[_record(job.id), _record(job.id) + ":events"],
            args=[job.token, event or "", *_flat(fields)],
        )
        return bool(done)

    async def release(self, job: Job) -> None:
        """Hand `job` over to the next that claims; it counts as no lost attempt."""
        await self._release(keys=[_record(job.id), _RUNNING], args=[job.token, job.id])

    async def finish(self, job: Job, state: Ended, **fields: Any) -> bool:
        """End `job`. False: it is somebody else's now."""
        return await self._end(job.id, job.token, state=state, finished_at=time.time(), **fields)

    async def _end(self, job_id: str, token: str, **fields: Any) -> bool:
        record = _record(job_id)
        done = await self._finish(
            keys=[record, record + ":events", _RUNNING, _WAITING, _ALL],
            args=[token, job_id, int(self._ttl_s), *_flat(fields)],
        )
        return bool(done)


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


def _record(job_id: str) -> str:
    return _PREFIX + job_id


def _flat(fields: Mapping[str, Any]) -> list[str]:
    flat = []
    for name, value in fields.items():
        flat += [name, value if isinstance(value, str) else json.dumps(value)]
    return flat


def _read(job_id: str, fields: dict[str, bytes], ttl_s: float) -> Job | None:
    if not fields:
        return None
    text = {name: value.decode() for name, value in fields.items()}

    def parsed(name: str) -> Any:
        return json.loads(text[name]) if name in text else None

    return Job(
        id=job_id,
        path=text["path"],
        body=parsed("body"),
        state=text["state"],  # type: ignore[arg-type]
        attempts=int(text["attempts"]),
        created_at=parsed("created_at"),
        deadline=parsed("deadline"),
        ttl_s=ttl_s,
        first_token_at=parsed("first_token_at"),
        finished_at=parsed("finished_at"),
        stages=tuple(StageStart(**start) for start in parsed("stages") or ()),
        result=parsed("result"),
        error=parsed("error"),
        is_given_up="given_up" in text,
        is_unwanted="cancel" in text,
        token=text.get("token", ""),
    )
