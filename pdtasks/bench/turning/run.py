"""Ask what a phase says, phase after phase, and note each second how it goes.

Open loop: requests come at random times (Poisson), whatever the answers do.  Latencies are what an
HTTP client sees, roles what the API tells of the workers.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import httpx

from pdtasks.bench.asking import new_prompt, stream_tokens

_PHASE: Final = re.compile(r"(\d{1,7})/(\d{1,7})@(\d{1,6}(?:\.\d+)?)")
#: Seconds whose requests make a moment's figures.
_WINDOW_S: Final = 5.0
#: Seconds between two moments.
_EVERY_S: Final = 1.0
#: Seconds for the last answers.
_END_S: Final = 120.0


@dataclass(frozen=True)
class Phase:
    """What is asked for a while."""

    prompt: int  #: tokens
    answer: int  #: tokens
    rate: float  #: requests/s

    def __str__(self) -> str:
        return f"{self.prompt}/{self.answer} at {self.rate:g}/s"

    @classmethod
    def read(cls, text: str) -> Phase:
        """Of `PROMPT/ANSWER@RATE`. Raises ValueError."""
        parts = _PHASE.fullmatch(text)
        found = cls(int(parts[1]), int(parts[2]), float(parts[3])) if parts else None
        if found is None or found.prompt < 1 or found.answer < 2 or found.rate <= 0:
            raise ValueError(f"{text!r} is not PROMPT/ANSWER@RATE, as 1200/8@0.5")
        return found


@dataclass(frozen=True)
class Moment:
    """One look. Milliseconds; None: nobody had a token in the last seconds."""

    at_s: float
    phase: str
    roles: Mapping[str, int]  #: ready workers of each
    ttft_p50_ms: float | None
    itl_p50_ms: float | None
    waiting: int  #: requests without a first token
    longest_wait_ms: float
    under_way: int
    ended: int
    failed: int


@dataclass
class _Asked:
    began: float
    at: list[float] = field(default_factory=list)
    failed: bool = False
    ended: bool = False


def run_turning(
    client: httpx.AsyncClient,
    model: str,
    phases: Sequence[Phase],
    seconds: float,
    progress: Callable[[str], None],
) -> Any:
    """Each phase for `seconds`; a coroutine that gives the moments as plain values."""
    return _Run(client, model, progress).go(phases, seconds)


class _Run:
    def __init__(
        self, client: httpx.AsyncClient, model: str, progress: Callable[[str], None]
    ) -> None:
        self._client = client
        self._model = model
        self._progress = progress
        self._asked: list[_Asked] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = time.perf_counter()
        self._phase = ""
        self._moments: list[Moment] = []

    async def go(self, phases: Sequence[Phase], seconds: float) -> list[dict[str, Any]]:
        looking = asyncio.create_task(self._look_on())
        try:
            for phase in phases:
                self._phase = str(phase)
                until = time.perf_counter() + seconds
                while (left := until - time.perf_counter()) > 0:
                    pause = random.expovariate(phase.rate)
                    await asyncio.sleep(min(left, pause))
                    if pause < left:
                        self._begin(phase)
            self._phase = "the end"
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            looking.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(looking, *self._tasks, return_exceptions=True)
        return [asdict(moment) for moment in self._moments]

    def _begin(self, phase: Phase) -> None:
        task = asyncio.create_task(self._ask(phase))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, phase: Phase) -> None:
        one = _Asked(time.perf_counter())
        self._asked.append(one)
        prompt = new_prompt(phase.prompt)
        try:
            await stream_tokens(
                self._client, self._model, prompt, phase.answer, at=one.at, headers={}
            )
            one.failed = len(one.at) != phase.answer
        except httpx.HTTPError as exc:
            if not any(other.failed for other in self._asked):
                self._progress(f"a request failed: {str(exc) or type(exc).__name__}")
            one.failed = True
        finally:
            one.ended = True

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            with suppress(httpx.HTTPError, ValueError, LookupError):
                answer = await self._client.get("/pdtasks/overview?limit=0")
                workers = answer.raise_for_status().json()["workers"]
                roles = Counter(w["role"] for w in workers if w["state"] == "ready")
                moment = self._moment(dict(roles))
                before = self._moments[-1].roles if self._moments else {}
                self._moments.append(moment)
                if moment.roles != before:
                    told = ", ".join(f"{number} {role}" for role, number in sorted(roles.items()))
                    self._progress(f"{moment.at_s:5.0f} s  {self._phase}: {told}")

    def _moment(self, roles: Mapping[str, int]) -> Moment:
        now = time.perf_counter()
        since = now - _WINDOW_S
        waits = [now - one.began for one in self._asked if not (one.at or one.ended)]
        first = [one.at[0] - one.began for one in self._asked if one.at and one.at[0] >= since]
        gaps = [
            later - earlier
            for one in self._asked
            if one.at and one.at[-1] >= since
            for earlier, later in itertools.pairwise(one.at)
            if later >= since
        ]
        return Moment(
            at_s=round(now - self._began, 1),
            phase=self._phase,
            roles=roles,
            ttft_p50_ms=_ms(first),
            itl_p50_ms=_ms(gaps),
            waiting=len(waits),
            longest_wait_ms=round(1000 * max(waits, default=0.0), 1),
            under_way=sum(not one.ended for one in self._asked),
            ended=sum(one.ended for one in self._asked),
            failed=sum(one.failed for one in self._asked),
        )


def _ms(seconds: Sequence[float]) -> float | None:
    return round(1000 * statistics.median(seconds), 1) if seconds else None
