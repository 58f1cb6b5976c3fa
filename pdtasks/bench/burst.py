"""Does a burst stall the running stack?  Many short requests at once, round after round.

Each round is 300 parallel requests of one token, each with another prompt.  Then come two requests
for 512 choices each, and a plain one.  What counts is that all are answered, how long the slowest
took, and how many connections RabbitMQ has opened meanwhile: a stack that is well needs none.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from pdtasks.errors import PdtasksError

PARALLEL = 300
CHOICES = 512
ROUNDS = 5

#: Seconds that an answer may take.
_ANSWER_S = 120.0
#: Seconds that RabbitMQ's statistics may lag behind; unchanged for longer: they are right.
_SETTLE_S = 6.0
_SETTLE_MAX_S = 30.0

Tell = Callable[[str], None]


class NotReady(PdtasksError):
    """There is no stack that could be measured."""


@dataclass(frozen=True)
class Burst:
    """What came of it."""

    requests: int
    answered: int
    slowest_s: float  #: of those that were answered
    connections_opened: int | None  #: by RabbitMQ's count; None: it has no management URL

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class _Outcome:
    seconds: float
    error: str  #: empty: answered

    @property
    def answered(self) -> bool:
        return not self.error


def run_burst(
    api_url: str,
    model: str,
    broker_api_url: str | None,
    tell: Tell,
    *,
    rounds: int = ROUNDS,
    parallel: int = PARALLEL,
    choices: int = CHOICES,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Burst:
    """Measure the stack behind `api_url`.

    Args:
        broker_api_url: RabbitMQ's management API, with user and password.
        tell: gets a line for each step.
        transport: of HTTP; a test's.

    Raises NotReady when nobody answers there, or the stack is not ready.
    """
    _allow_files(parallel + 64)
    return asyncio.run(
        _Bench(api_url, model, broker_api_url, tell, transport).run(rounds, parallel, choices)
    )


def format_burst(burst: Burst) -> str:
    """A table for people."""
    opened = burst.connections_opened
    rows = [
        ("requests", str(burst.requests)),
        ("answered", str(burst.answered)),
        ("slowest", f"{burst.slowest_s:.2f} s"),
        (
            "connections opened",
            "unknown (set PDTASKS_BROKER_API_URL)" if opened is None else str(opened),
        ),
    ]
    return "\n".join(f"{name:<19} {value}" for name, value in rows)


class _Bench:
    def __init__(
        self,
        api_url: str,
        model: str,
        broker_api_url: str | None,
        tell: Tell,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self._model = model
        self._broker = broker_api_url
        self._tell = tell
        self._outcomes: list[_Outcome] = []
        # None is kept: the API closes idle ones, possibly while a request is on its way there.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(
            base_url=api_url, timeout=_ANSWER_S, limits=limits, transport=transport
        )

    async def run(self, rounds: int, parallel: int, choices: int) -> Burst:
        async with self._client:
            await self._require_ready()
            before = await self._connections_opened(first=True)
            for n in range(1, rounds + 1):
                await self._step(
                    f"round {n} of {rounds}: {parallel} requests of one token",
                    [self._ask(f"{n}, {i}:", max_tokens=1) for i in range(parallel)],
                )
            for n in (1, 2):
                await self._step(
                    f"{choices} choices, {n} of 2",
                    [self._ask(f"Choice {n}:", max_tokens=2, n=choices)],
                )
            await self._step("a plain request", [self._ask("Name a river.", max_tokens=8)])
            after = await self._connections_opened()
        opened = None if before is None or after is None else after - before
        answered = [outcome for outcome in self._outcomes if outcome.answered]
        return Burst(
            requests=len(self._outcomes),
            answered=len(answered),
            slowest_s=max((outcome.seconds for outcome in answered), default=0.0),
            connections_opened=opened,
        )

    async def _require_ready(self) -> None:
        try:
            response = await self._client.get("/ready", timeout=10)
        except httpx.HTTPError as exc:
            raise NotReady(
                f"no API answers at {self._client.base_url} ({type(exc).__name__}): start a stack "
                "with `pdtasks up`"
            ) from exc
        if response.status_code != 200:
            raise NotReady(f"the stack is not ready: {response.text[:300]}")

    async def _step(self, what: str, requests: list[Any]) -> None:
        began = time.monotonic()
        outcomes = await asyncio.gather(*requests)
        self._outcomes += outcomes
        failed = [outcome for outcome in outcomes if not outcome.answered]
        line = f"{what}: {len(outcomes) - len(failed)} answered in {time.monotonic() - began:.1f} s"
        if failed:
            line += f", {len(failed)} not ({failed[0].error})"
        self._tell(line)

    async def _ask(self, prompt: str, *, max_tokens: int, n: int = 1) -> _Outcome:
        began = time.monotonic()
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "n": n,
        }
        error = ""
        try:
            response = await self._client.post("/v1/completions", json=body)
            if response.status_code != 200:
                error = f"HTTP {response.status_code}: {response.text[:100]}"
            elif len(response.json()["choices"]) != n:
                error = "choices are missing"
        except (httpx.HTTPError, ValueError, KeyError) as exc:
            error = type(exc).__name__
        return _Outcome(time.monotonic() - began, error)

    async def _connections_opened(self, *, first: bool = False) -> int | None:
        """RabbitMQ's count since its start; waits until what has happened is counted."""
        if self._broker is None:
            return None
        if not first:
            self._tell("waiting for RabbitMQ's statistics")
        async with httpx.AsyncClient(base_url=self._broker, timeout=10) as client:
            last = -1
            since = began = time.monotonic()
            while time.monotonic() - since < _SETTLE_S:
                response = await client.get("overview")
                response.raise_for_status()
                count = int(response.json().get("churn_rates", {}).get("connection_created", 0))
                if count != last:
                    last, since = count, time.monotonic()
                if time.monotonic() - began > _SETTLE_MAX_S:
                    break
                await asyncio.sleep(0.5)
        return last


def _allow_files(wanted: int) -> None:
    """Each request has a connection of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2 * wanted:
        limit = 2 * wanted if hard == resource.RLIM_INFINITY else min(hard, 2 * wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
