"""Does a running stack answer bursts? What a worker that stalls, or reconnects, would show.

Each round: many requests at once; the last one ends with one request for many answers, twice, and a
plain one.  Asked over HTTP, as any caller would, each request over a connection of its own.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from pdtasks.bench.connections import count_connections
from pdtasks.cluster.children import api_url
from pdtasks.errors import BrokerUnavailable, NoWorker
from pdtasks.settings import Settings

#: Requests at once.
PARALLEL = 300
#: Answers to one request.
CHOICES = 512
#: Seconds that one request may take; one that takes longer was not answered.
ANSWER_S = 120.0
_CONNECT_S = 30.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Burst:
    """What came of it."""

    requests: int  #: HTTP requests
    answered: int  #: completely
    slowest_s: float  #: of all, answered or not
    connections_opened: int | None  #: at RabbitMQ, by its own count; None: it was not to be had


@dataclass(frozen=True)
class _Outcome:
    """What came of one request."""

    seconds: float
    problem: str = ""  #: empty: it was answered
    late: bool = False  #: nobody knows whether an answer would ever have come


def run_burst(
    settings: Settings,
    rounds: int,
    progress: Progress,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    count: Callable[[str], int] = count_connections,
) -> Burst:
    """Ask the stack that `settings` know; nothing more once a request was not answered in time.

    Raises NoWorker, saying what to do, when no stack answers or it is not ready.
    """
    # httpx logs each request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _allow_connections()
    caller = _Caller(api_url(settings), transport)
    model = asyncio.run(caller.look())
    opened = _Opened(settings.broker_api_url, count, progress)
    outcomes: list[_Outcome] = []
    for number in range(1, rounds + 1):
        made = asyncio.run(_round(caller, model, number, rounds, progress))
        outcomes += made
        if any(outcome.late for outcome in made):
            break
    return Burst(
        requests=len(outcomes),
        answered=sum(not outcome.problem for outcome in outcomes),
        slowest_s=round(max(outcome.seconds for outcome in outcomes), 3),
        connections_opened=opened.until_now(),
    )


def format_burst(burst: Burst) -> str:
    """A table of one row."""
    opened = burst.connections_opened
    cells = {
        "requests": str(burst.requests),
        "answered": str(burst.answered),
        "slowest, s": f"{burst.slowest_s:.2f}",
        "connections opened": "-" if opened is None else str(opened),
    }
    return "\n".join(
        "  ".join(cell.rjust(len(name)) for name, cell in row)
        for row in ([(name, name) for name in cells], list(cells.items()))
    )


async def _round(
    caller: _Caller, model: str, number: int, rounds: int, progress: Progress
) -> list[_Outcome]:
    started = time.monotonic()
    one_token = [
        {"prompt": f"Round {number}, question {i}:", "max_tokens": 1, "temperature": 0}
        for i in range(PARALLEL)
    ]
    many = {
        "prompt": f"Round {number}: once upon a time",
        "n": CHOICES,
        "max_tokens": 2,
        "ignore_eos": True,
        "temperature": 1,
    }
    plain = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    parts: list[tuple[str, float, Sequence[_Outcome]]] = []
    planned: list[tuple[str, list[dict[str, Any]]]] = [(f"{PARALLEL} at once", one_token)]
    if number == rounds:
        planned += [(f"n: {CHOICES}", [many])] * 2 + [("plain", [plain])]
    for part, bodies in planned:
        began = time.monotonic()
        made = await caller.ask([{"model": model, **body} for body in bodies])
        parts.append((part, time.monotonic() - began, made))
        if any(outcome.late for outcome in made):
            break
    outcomes = [outcome for _, _, made in parts for outcome in made]
    problems = Counter(outcome.problem for outcome in outcomes if outcome.problem)
    took = ", ".join(f"{part} {seconds:.1f} s" for part, seconds, _ in parts)
    num_answered = len(outcomes) - problems.total()
    progress(
        f"round {number} of {rounds}: {num_answered} of {len(outcomes)} answered "
        f"in {time.monotonic() - started:.1f} s ({took})"
        + "".join(f"; {times} × {problem}" for problem, times in problems.items())
    )
    return outcomes


class _Caller:
    """Somebody who asks over HTTP."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None) -> None:
        self._url = url
        self._transport = transport

    async def look(self) -> str:
        """The model that is served. Raises NoWorker when nothing is."""
        async with self._client() as client:
            try:
                ready = await client.get("/ready", timeout=10)
                models = await client.get("/v1/models", timeout=10)
            except httpx.HTTPError as exc:
                raise NoWorker(
                    f"no API answers at {self._url} ({type(exc).__name__}): start a stack with "
                    "`pdtasks up`, or say with PDTASKS_HOME which one is meant"
                ) from exc
            if ready.status_code != 200:
                raise NoWorker(
                    f"the stack at {self._url} is not ready ({_detail(ready)}): "
                    "wait until `pdtasks status` shows a ready worker of each stage"
                )
            try:
                return str(models.json()["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise NoWorker(
                    f"what answers at {self._url} is no API of pdtasks: start a stack with "
                    "`pdtasks up`, or say with PDTASKS_HOME which one is meant"
                ) from None

    async def ask(self, bodies: Sequence[dict[str, Any]]) -> list[_Outcome]:
        """Ask for all at once; returns when each is answered, or will not be."""
        async with self._client() as client:
            return await asyncio.gather(*(_ask(client, body) for body in bodies))

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        # A connection that the server closes just when it is used again would look like a fault.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self._url,
            limits=limits,
            timeout=httpx.Timeout(ANSWER_S, connect=_CONNECT_S),
            transport=self._transport,
            trust_env=False,  # no proxy
        ) as client:
            yield client


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> _Outcome:
    began = time.monotonic()
    problem, late = "", False
    try:
        async with asyncio.timeout(ANSWER_S):
            answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            problem = f"HTTP {answer.status_code}"
        elif len(answer.json()["choices"]) != body.get("n", 1):
            problem = "answers missing"
    except (TimeoutError, httpx.ReadTimeout):
        problem, late = f"no answer within {ANSWER_S:g} s", True
    except httpx.HTTPError as exc:
        problem = type(exc).__name__
    except (ValueError, LookupError, TypeError):
        problem = "not an answer"
    return _Outcome(time.monotonic() - began, problem, late)


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, LookupError, TypeError):
        return f"HTTP {answer.status_code}"


class _Opened:
    """Connections that are opened at RabbitMQ from now on, whoever does it."""

    def __init__(
        self, api_url: str | None, count: Callable[[str], int], progress: Progress
    ) -> None:
        self._api_url = api_url
        self._count = count
        self._progress = progress
        self._before = self._read()

    def until_now(self) -> int | None:
        """None when RabbitMQ does not tell; why was said."""
        if self._before is None:
            return None
        now = self._read()
        return None if now is None else now - self._before

    def _read(self) -> int | None:
        if self._api_url is None:
            self._progress(
                "connections are not counted: no management API of RabbitMQ is known "
                "(PDTASKS_BROKER_API_URL)"
            )
            return None
        try:
            return self._count(self._api_url)
        except BrokerUnavailable as exc:
            self._progress(f"connections are not counted: {exc}")
            return None


def _allow_connections() -> None:
    """Each request needs a file descriptor; the usual limit is a soft one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
