"""The changes of a job, each done whole in the server or not at all: `lua/`, with named parameters.

One that is made by a runner counts only as long as it holds the lease (`token`), so a runner that
was frozen cannot write into its successor's work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import valkey.asyncio

from pdtasks.bus import keys
from pdtasks.bus.scripts import MOST_MEMORY, flat, script
from pdtasks.errors import NoRoomForJobs

#: Names of expired jobs that one submission forgets.
_FORGOTTEN_AT_ONCE = 10


def record_key(job_id: str) -> str:
    """The key of a job's record."""
    return keys.JOB + job_id


def events_key(job_id: str) -> str:
    """The key of a job's events."""
    return record_key(job_id) + keys.EVENTS


class JobScripts:
    """All of them, on one bus. Every method raises what is in `bus.connection.BUS_ERRORS`."""

    def __init__(self, bus: valkey.asyncio.Valkey) -> None:
        def named(name: str) -> Any:
            return script(bus, name)

        self._create, self._claim, self._renew = map(named, ("create", "claim", "renew"))
        self._write, self._finish = map(named, ("write", "finish"))
        self._cancel, self._release = map(named, ("cancel", "release"))

    async def create(
        self,
        job_id: str,
        fields: Mapping[str, Any],
        *,
        owner: str,
        digest: str,
        key: str | None,
        ttl_s: int,
        most_waiting: int,
    ) -> tuple[str, str]:
        """Take a job in; returns digest and id, of an earlier one if `key` is known.

        Args:
        owner: in whose turn it is claimed.
        digest: of what has to be the same under one `key`, an Idempotency-Key's digest.

        Raises NoRoomForJobs.
        """
        names = [record_key(job_id), keys.JOBS, keys.JOBS_WAITING, keys.JOBS_TURNS]
        if key is not None:
            names.append(keys.IDEMPOTENCY + key)
        known: bytes = await self._create(
            keys=names,
            args=[
                *(keys.JOB, job_id, owner, digest, ttl_s, _FORGOTTEN_AT_ONCE),
                *(most_waiting, MOST_MEMORY, *flat(fields)),
            ],
        )
        if known == b"jobs":
            raise NoRoomForJobs(
                f"{most_waiting} jobs wait already: come again later, or have "
                "PDTASKS_MAX_WAITING_JOBS raised"
            )
        if known == b"memory":
            raise NoRoomForJobs(
                "jobs and their results fill the bus: come again when some have expired, or give "
                "the bus more memory",
                retry_after_s=60,
            )
        known_digest, known_id = known.decode().split()
        return known_digest, known_id

    async def claim(self, token: str, *, lease_s: float, most_attempts: int) -> str | None:
        """The id of a job that this token's runner runs now; None when there is none."""
        name: bytes | None = await self._claim(
            keys=[keys.JOBS_RUNNING, keys.JOBS_WAITING],
            args=[keys.JOB, token, lease_s, most_attempts],
        )
        return None if name is None else name.decode()

    async def renew(
        self, job_id: str, token: str, *, lease_s: float
    ) -> Literal["held", "lost", "cancel"]:
        """Hold a job for `lease_s` more."""
        answer: bytes = await self._renew(
            keys=[record_key(job_id), keys.JOBS_RUNNING], args=[job_id, token, lease_s]
        )
        return answer.decode()  # type: ignore[return-value]  # one of the three

    async def write(
        self, job_id: str, token: str, event: str | None, fields: Mapping[str, Any]
    ) -> bool:
        """Append `event`, set `fields`. False: another one runs the job."""
        done = await self._write(
            keys=[record_key(job_id), events_key(job_id)],
            args=[token, event or "", *flat(fields)],
        )
        return bool(done)

    async def finish(
        self, job_id: str, token: str, fields: Mapping[str, Any], *, ttl_s: int
    ) -> bool:
        """End a job; `token` is empty for one that nobody runs. False: somebody (else) does."""
        indexes = [keys.JOBS_RUNNING, keys.JOBS_WAITING, keys.JOBS, keys.JOBS_TURNS]
        done = await self._finish(
            keys=[record_key(job_id), events_key(job_id), *indexes],
            args=[job_id, token, ttl_s, *flat(fields)],
        )
        return bool(done)

    async def cancel(self, job_id: str) -> None:
        """Tell a job's runner that nobody wants it any more."""
        await self._cancel(keys=[record_key(job_id)])

    async def release(self, job_id: str, token: str) -> None:
        """Hand a job over to the next that claims."""
        await self._release(keys=[record_key(job_id), keys.JOBS_RUNNING], args=[job_id, token])
