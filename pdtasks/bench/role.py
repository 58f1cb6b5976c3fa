"""How long does a worker take to serve another stage, and what do requests notice?

Requests come at random times to a running stack while one of its workers takes one role after the
other.  What is told of it comes from outside: the API says when the worker serves, each request's
report who did which stage and when, an HTTP client when it read each token.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from pdtasks.bench.asking import ask_stack, format_table, new_prompt, stream_tokens
from pdtasks.errors import NoWorker
from pdtasks.naming import DECODE, PREFILL, stages_of
from pdtasks.settings import Settings

#: Seconds in which a worker has to take another role.
_CHANGE_S = 120.0
_LOOK_S = 0.02

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Load:
    """What is asked meanwhile."""

    rate: float  #: requests/s, Poisson
    prompt: int  #: tokens
    answer: int  #: tokens
    hold_s: float  #: seconds before the first change, and after each


@dataclass(frozen=True)
class Change:
    """One change of roles. Milliseconds, but for counts."""

    role: str
    serves_ms: float  #: from the order until the API says so
    first_job_ms: float | None  #: until the first job of a stage that it did not serve; None: none
    requests: int  #: that were under way then or came until the next change
    failed: int
    worst_gap_ms: float  #: between two tokens of one of them


@dataclass(frozen=True)
class Result:
    """All of it; the first change is none: how it was before."""

    worker: str
    before: Change
    changes: tuple[Change, ...]


@dataclass
class _Asked:
    began: float  # UNIX seconds
    at: list[float] = field(default_factory=list)  # UNIX seconds of its tokens
    failed: bool = False
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> float:
        return self.at[-1] if self.at else self.began

    def gap(self, begin: float, end: float) -> float:
        """The longest between two tokens that ended within, seconds."""
        between = itertools.pairwise(self.at)
        return max((b - a for a, b in between if begin <= b < end), default=0.0)

    def stage_began(self, stage: str, worker: str) -> float | None:
        """UNIX seconds; None where another worker did it, or nobody."""
        if not self.report:
            return None
        (stages,), times = self.report["sequences"], self.report["times"][0]
        found = stages.get(stage)
        if found is None or found["worker"] != worker:
            return None
        before = times["first_s"] if stage == DECODE and PREFILL in stages else 0.0
        return float(times["submitted_at"]) + before + float(found["queue_s"])


def run_role(
    settings: Settings, worker: str, roles: Sequence[str], load: Load, progress: Progress
) -> Result:
    """Have `worker` take `roles` in turn. Raises NoWorker and InvalidRequest, saying what to do."""

    async def ask(client: httpx.AsyncClient, model: str) -> Result:
        name, role = await _when_ready(client, worker)
        asked: list[_Asked] = []
        under_way: list[asyncio.Task[None]] = []

        async def ask_on() -> None:
            while True:
                one = _Asked(time.time())
                asked.append(one)
                under_way.append(asyncio.create_task(_ask(client, model, load, one)))
                await asyncio.sleep(random.expovariate(load.rate))

        loading = asyncio.create_task(ask_on())
        try:
            marks = [(time.time(), role, 0.0)]
            await asyncio.sleep(load.hold_s)
            for role in roles:
                told = time.time()
                wish = {"role": role}
                answer = await client.post(f"/pdtasks/workers/{worker}/role", json=wish)
                answer.raise_for_status()
                await _when_ready(client, worker, role)
                marks.append((told, role, time.time() - told))
                progress(f"{name} serves {role} after {marks[-1][2]:.2f} s")
                await asyncio.sleep(load.hold_s)
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        await asyncio.gather(*under_way, return_exceptions=True)
        return _result(name, marks, asked)

    return ask_stack(settings, ask)


async def _ask(client: httpx.AsyncClient, model: str, load: Load, one: _Asked) -> None:
    name, at = uuid.uuid4().hex, list[float]()
    offset = time.time() - time.perf_counter()
    try:
        await stream_tokens(
            client, model, new_prompt(load.prompt), load.answer, at=at,
            headers={"X-Request-Id": name},
        )  # fmt: skip
        one.failed = len(at) != load.answer
        report = await client.get(f"/pdtasks/requests/cmpl-{name}")
        one.report = report.json() if report.is_success else {}
    except httpx.HTTPError:
        one.failed = True
    finally:
        one.at = [offset + moment for moment in at]


async def _look(client: httpx.AsyncClient, worker: str) -> tuple[str, str]:
    """Its whole name, and its role; empty while it has none."""
    overview = (await client.get("/pdtasks/overview?limit=0")).raise_for_status().json()
    for found in overview["workers"]:
        if worker in (found["name"], found["name"].partition("@")[0]):
            return found["name"], found["role"] if found["state"] == "ready" else ""
    names = ", ".join(one["name"] for one in overview["workers"])
    raise NoWorker(f"no worker is called {worker!r}, only {names}")


async def _when_ready(client: httpx.AsyncClient, worker: str, wanted: str = "") -> tuple[str, str]:
    """Wait until it has a role, or the one that is `wanted`: its whole name, and the role."""
    until = time.monotonic() + _CHANGE_S
    while True:
        name, role = await _look(client, worker)
        if role and wanted in ("", role):
            return name, role
        if time.monotonic() > until:
            raise NoWorker(f"{worker} does not serve {wanted} within {_CHANGE_S:.0f} s")
        await asyncio.sleep(_LOOK_S)


def _result(name: str, marks: list[tuple[float, str, float]], asked: list[_Asked]) -> Result:
    ends = [told for told, _, _ in marks[1:]] + [float("inf")]
    changes, before = [], marks[0][1]
    for (told, role, serves_s), end in zip(marks, ends, strict=True):
        new = set(stages_of(role)) - set(stages_of(before))
        began = [
            at
            for stage in new
            for one in asked
            if (at := one.stage_began(stage, name)) is not None and told <= at < end
        ]
        there = [one for one in asked if one.began < end and (one.failed or one.ended >= told)]
        changes.append(
            Change(
                role=role,
                serves_ms=round(1000 * serves_s, 1),
                first_job_ms=round(1000 * (min(began) - told), 1) if began else None,
                requests=len(there),
                failed=sum(one.failed for one in there),
                worst_gap_ms=round(1000 * max((one.gap(told, end) for one in there), default=0), 1),
            )
        )
        before = role
    return Result(name, changes[0], tuple(changes[1:]))


def to_json(result: Result) -> str:
    """One object."""
    return json.dumps(asdict(result), indent=1)


def format_role(result: Result) -> str:
    """A table, a line for each change."""
    head = ("role", "serves ms", "first job ms", "requests", "failed", "worst gap ms")
    lines = [
        (
            f"{one.role}{' before' if one is result.before else ''}",
            f"{one.serves_ms:.0f}",
            "-" if one.first_job_ms is None else f"{one.first_job_ms:.0f}",
            *(str(one.requests), str(one.failed), f"{one.worst_gap_ms:.0f}"),
        )
        for one in (result.before, *result.changes)
    ]
    return format_table(head, lines)
