"""Clients that ask for more than the stack can do, and count what they are told.

The stub engine's tokens follow from the prompt, so each answer is compared with the right one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle

import aiohttp

from api.admission import LATEST_S
from pdtasks.bench.chaos.stub import TOKENS, kv_of, token_of

#: Tokens of a prompt.
_PROMPT = 64
#: Seconds beyond the deadline after which a client gives up.
_SLACK_S = 15.0
#: Seconds before one asks again who does as he likes.
_PAUSE_S = 0.2


@dataclass
class Seen:
    """What the clients of one phase were told."""

    took_s: list[float] = field(default_factory=list)  #: of the right answers
    ended_at: list[float] = field(default_factory=list)  #: seconds since the phase began
    retry_after_s: list[int] = field(default_factory=list)  #: of who was refused
    failed: Counter[str] = field(default_factory=Counter)  #: neither: how
    came_again: int = 0  #: as told, of who was told less than `LATEST_S`
    came_in_vain: int = 0  #: of those, refused again

    @property
    def asked(self) -> int:
        """Requests."""
        return len(self.took_s) + len(self.retry_after_s) + self.failed.total()


class Clients:
    """For one event loop. All methods return when everything that was asked has ended."""

    def __init__(self, urls: Sequence[str], model: str, *, tokens: int, deadline_s: float) -> None:
        """Args:
        urls: of the API processes, which are asked in turn.
        tokens: of an answer.
        """
        self._urls = cycle(urls)
        self._model = model
        self._tokens = tokens
        self._patience_s = deadline_s + _SLACK_S
        self._rng = random.Random(1)  # noqa: S311 - not a secret
        self._session: aiohttp.ClientSession

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Everything else happens in here."""
        timeout = aiohttp.ClientTimeout(total=self._patience_s)
        # A connection that the server closes just when it is used again would look like a fault.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session:
            yield

    async def ask(self, seen: Seen, began: float, tokens: int | None = None) -> int | None:
        """One request; returns the seconds after which to come again if it was refused."""
        tokens = tokens or self._tokens
        prompt = self._rng.choices(TOKENS, k=_PROMPT)
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        asked = time.monotonic()
        try:
            url = f"{next(self._urls)}/v1/completions"
            async with self._session.post(url, json=body) as answer:
                if answer.status == 429:
                    told = int(answer.headers["Retry-After"])
                    seen.retry_after_s.append(told)
                    return told
                answer.raise_for_status()
                (choice,) = (await answer.json())["choices"]
        except (aiohttp.ClientError, TimeoutError, LookupError, ValueError) as exc:
            status = getattr(exc, "status", "")
            seen.failed[f"{type(exc).__name__} {status}".strip()] += 1
            return None
        kv = kv_of(prompt)
        if choice["token_ids"] != [token_of(kv, None, place) for place in range(tokens)]:
            seen.failed["wrong answer"] += 1
            return None
        seen.took_s.append(time.monotonic() - asked)
        seen.ended_at.append(time.monotonic() - began)
        return None

    async def keep(self, num: int, seconds: float) -> Seen:
        """`num` clients for `seconds`, each asking again when it has its answer, or none."""
        seen, began = Seen(), time.monotonic()

        async def client() -> None:
            while time.monotonic() < began + seconds:
                if await self.ask(seen, began) is not None:
                    await asyncio.sleep(_PAUSE_S)

        await asyncio.gather(*(client() for _ in range(num)))
        return seen

    async def flood(self, per_s: float, seconds: float) -> Seen:
        """New clients, `per_s` each second at random times, who come once."""
        seen, began = Seen(), time.monotonic()
        at = 0.0
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < began + seconds:
                at += self._rng.expovariate(per_s)
                await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                group.create_task(self.ask(seen, began))
        return seen

    async def come_again(self, num: int, seconds: float) -> Seen:
        """`num` clients for `seconds` who come again when they were told to, until answered."""
        seen, began = Seen(), time.monotonic()

        async def client() -> None:
            is_again = False
            while time.monotonic() < began + seconds:
                told = await self.ask(seen, began)
                seen.came_again += is_again
                seen.came_in_vain += is_again and told is not None
                is_again = told is not None and told < LATEST_S
                if told is not None:
                    await asyncio.sleep(told)

        await asyncio.gather(*(client() for _ in range(num)))
        return seen

    async def probe(self) -> float:
        """Seconds of one short answer, at most of `_SLACK_S`; infinite when there was none."""
        seen, began = Seen(), time.monotonic()
        try:
            async with asyncio.timeout(_SLACK_S):
                await self.ask(seen, began, tokens=2)
        except TimeoutError:
            pass
        return seen.took_s[0] if seen.took_s else float("inf")
