"""A tenant who asks now and then, and one who asks for very much."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from typing import Any

import aiohttp

from pdtasks.bench.chaos.stub import TOKENS

_PROMPT = 64  # tokens
_ANSWER = 8  # tokens
_PATIENCE_S = 120.0
#: Jobs that are submitted at once.
_AT_ONCE = 16


class Tenant:
    """All that one key asks for. For one event loop."""

    def __init__(self, urls: Sequence[str], model: str, secret: str) -> None:
        """`urls`: of the API processes, which are asked in turn."""
        self.answers = 0  # that it has had
        self._urls = cycle(urls)
        self._model = model
        self._secret = secret
        self._rng = random.Random(secret)  # noqa: S311 - for prompts
        self._session: aiohttp.ClientSession

    async def open(self) -> None:
        """Before anything else."""
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._secret}"},
            timeout=aiohttp.ClientTimeout(total=_PATIENCE_S),
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def close(self) -> None:
        """Behind everything else."""
        await self._session.close()

    async def ask(self, answers: int = 1, prompts: int = 1) -> float:
        """Seconds of one request, for so many answers to each of its prompts.

        Raises aiohttp.ClientError when it has none.
        """
        began = time.monotonic()
        async with self._session.post(
            f"{next(self._urls)}/v1/completions", json=self._body(answers, prompts)
        ) as answer:
            answer.raise_for_status()
            await answer.read()
        self.answers += answers * prompts
        return time.monotonic() - began

    async def ask_for(self, seconds: float, pause_s: float) -> list[float]:
        """One question after the other, with pauses; seconds of each answer."""
        took, until = [], time.monotonic() + seconds
        while time.monotonic() < until:
            took.append(await self.ask())
            await asyncio.sleep(pause_s)
        return took

    async def submit(self, count: int) -> None:
        """Submit so many jobs."""
        numbers = iter(range(count))

        async def some() -> None:
            for _ in numbers:
                url = f"{next(self._urls)}/v1/jobs"
                async with self._session.post(url, json=self._body()) as answer:
                    answer.raise_for_status()
                    await answer.read()

        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(some())

    async def keep(self, count: int, answers: int = 1, prompts: int = 1) -> None:
        """So many requests at once, each as `ask` makes it, until cancelled."""

        async def again() -> None:
            while True:
                with suppress(aiohttp.ClientError, TimeoutError):
                    await self.ask(answers, prompts)

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(again())

    def _body(self, answers: int = 1, prompts: int = 1) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": [self._rng.choices(TOKENS, k=_PROMPT) for _ in range(prompts)],
            "n": answers,
            "max_tokens": _ANSWER,
            "temperature": 1,  # vLLM takes no n without it
            "ignore_eos": True,
        }
