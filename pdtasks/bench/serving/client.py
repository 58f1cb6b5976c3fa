"""How long do requests take that come at random times, and the gap after the first token?

Open loop: a request comes when its time has come, however slow the answers are.  Times are those
at which an HTTP client reads a token.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pdtasks.bench.serving.plan import Workload

#: Prompts are made of these token ids, which every tokenizer has as ordinary ones.
TOKENS = range(300, 30_000)
#: Seconds without a byte after which an answer is given up.
_SILENCE_S = 60.0
#: Seconds that a connection is kept for the next request.
_KEPT_S = 3.0


@dataclass(frozen=True)
class Request:
    """What is asked."""

    prompt: list[int]  #: token ids
    answer: int  #: tokens
    seed: int


@dataclass(frozen=True)
class Sample:
    """One request's fate. Times in seconds on one clock."""

    began: float
    at: tuple[float, ...] = ()  #: of each token
    failure: str | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  #: pdtasks' reports

    @property
    def ttft(self) -> float:
        """To the first token."""
        return self.at[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Between tokens; the first is that between the first token and the second."""
        return [later - earlier for earlier, later in itertools.pairwise(self.at)]

    @property
    def e2e(self) -> float:
        """To the last token."""
        return self.at[-1] - self.began


def make_requests(workload: Workload, rate: float, rng: random.Random) -> Iterator[Request]:
    """The requests of one run. Without a seed of `rng`'s owner no two runs share a prompt."""
    shared = rng.choices(TOKENS, k=workload.shared_prefix)
    for number in range(workload.num_requests(rate)):
        length = workload.prompt
        if workload.short is not None and number % workload.short.every == 0:
            length = workload.short.prompt
        yield Request(shared + rng.choices(TOKENS, k=length), workload.answer, number)


async def ask_all(
    url: str,
    model: str,
    requests: list[Request],
    rate: float,
    arrivals: random.Random,
    *,
    reports: bool,
) -> list[Sample]:
    """Ask all `requests` of the server at `url`, `rate` a second (0: at once).

    `arrivals` says when each comes; `reports`: it is pdtasks, so ask what the stages report.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_S)
    # A connection that the server, after 5 s, closes just when it is used again would be a failure.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        asked = []
        for request in requests:
            asked.append(asyncio.create_task(_ask(session, model, request, reports=reports)))
            if rate:
                await asyncio.sleep(arrivals.expovariate(rate))
        return await asyncio.gather(*asked)


async def _ask(
    session: aiohttp.ClientSession, model: str, request: Request, *, reports: bool
) -> Sample:
    name = uuid.uuid4().hex
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.answer,
        "ignore_eos": True,
        "temperature": 0.8,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        # Also of tokens that make no text.
        "return_token_ids": True,
    }
    began = time.perf_counter()
    try:
        async with session.post(
            "/v1/completions", json=body, headers={"X-Request-Id": name}
        ) as answer:
            if answer.status != 200:
                text = (await answer.text())[:200]
                return Sample(began, failure=f"HTTP {answer.status}: {text}")
            at, last = await _read(answer.content)
    except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
        return Sample(began, failure=f"{type(exc).__name__}: {exc}"[:200])
    usage = last.get("usage") or {}
    if usage.get("completion_tokens") != request.answer or not at:
        return Sample(began, failure=f"not the whole answer: {str(last)[:200]}")
    return Sample(began, at, None, await _stages(session, name) if reports else {})


async def _read(stream: aiohttp.StreamReader) -> tuple[tuple[float, ...], dict[str, Any]]:
    """When each token came, and the last chunk.

    Chunks are told apart by their first bytes: to parse each would make the client the slow part.
    """
    at: list[float] = []
    last = b"{}"
    async for line in stream:
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter()
        last = line[6:]
        if b'"token_ids":[' in last:
            # Several tokens come at once when the server was late.
            start = last.index(b'"token_ids":[') + 13
            ids = last[start : last.index(b"]", start)]
            at += [now] * (ids.count(b",") + 1 if ids else 0)
    return tuple(at), json.loads(last)


async def _stages(session: aiohttp.ClientSession, name: str) -> dict[str, dict[str, Any]]:
    async with session.get(f"/pdtasks/requests/cmpl-{name}") as report:
        if report.status != 200:
            return {}
        found: list[dict[str, dict[str, Any]]] = (await report.json())["sequences"]
        return found[0] if found else {}
