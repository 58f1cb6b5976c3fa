"""From which length on is a prompt worth handing over?

Asked over HTTP of a running stack: prompts of each length, each new, one after the other, in turn
through both stages and of one worker alone; meanwhile some answers are streamed, whose tokens come
later while a prompt is computed between them.  Where both cost as much is what
`PDTASKS_SHORT_PROMPT_TOKENS` should say.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import httpx

from pdtasks.bench.asking import (
    ROUTE_HEADER,
    ask_stack,
    format_table,
    new_prompt,
    stream_tokens,
)
from pdtasks.errors import InvalidRequest
from pdtasks.settings import Settings

#: Tokens of each answer that is measured.
_ANSWER: Final = 20
#: Tokens of the prompts and answers that are streamed meanwhile; one that ends is followed by the
#: next.
_OTHERS: Final = (600, 300)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One length, one way. Milliseconds; medians, where nothing else is said."""

    prompt_tokens: int
    route: str  #: "split" or "whole"
    others: int  #: answers that were streamed meanwhile
    ttft_ms: float
    gap_ms: float  #: from the first token to the second
    e2e_ms: float
    others_itl_ms: float  #: between two tokens of theirs, from the request to its second token
    others_longest_ms: float  #: the longest time between two of theirs, then


@dataclass(frozen=True)
class _Sample:
    began: float
    at: list[float]  #: when its tokens came


class _Stack:
    """Asks the stack that is measured."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def ask(
        self, prompt: list[int], answer: int, at: list[float], headers: dict[str, str]
    ) -> None:
        """As `stream_tokens`."""
        await stream_tokens(self._client, self._model, prompt, answer, at=at, headers=headers)

    async def require_way(self, name: str, route: str) -> None:
        """Raises InvalidRequest when request `name` has gone another one."""
        report = await self._client.get(f"/pdtasks/requests/cmpl-{name}")
        (stages,) = report.raise_for_status().json()["sequences"]
        if ("prefill" in stages) != (route == "split"):
            raise InvalidRequest(
                "this stack has one way only: start it with both kinds of workers, and without "
                "PDTASKS_SHORT_PROMPT_TOKENS=0"
            )


async def _stream_on(stack: _Stack, times: list[float]) -> None:
    prompt, answer = _OTHERS
    while True:
        await stack.ask(new_prompt(prompt), answer, times, {ROUTE_HEADER: "split"})


def run_route(
    settings: Settings, lengths: Sequence[int], others: int, requests: int, progress: Progress
) -> list[Row]:
    """Ask the stack that `settings` know. Raises NoWorker, saying what to do."""

    async def ask(client: httpx.AsyncClient, model: str) -> list[Row]:
        times: list[list[float]] = [[] for _ in range(others)]
        stack = _Stack(client, model)
        streams = [asyncio.create_task(_stream_on(stack, own)) for own in times]
        try:
            while not all(times):
                for stream in streams:
                    if stream.done():
                        await stream  # it raises why
                await asyncio.sleep(0.05)
            found: list[Row] = []
            for length in lengths:
                found += await _measure(stack, length, times, requests)
                for row in found[-2:]:
                    progress(f"{length} tokens, {row.route}: end to end {row.e2e_ms:.1f} ms")
            return found
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    return ask_stack(settings, ask)


async def _measure(
    stack: _Stack, length: int, times: list[list[float]], requests: int
) -> list[Row]:
    """`times`: when the tokens of each stream have come so far."""
    samples: dict[str, list[_Sample]] = {"split": [], "whole": []}
    for number, route in itertools.product(range(requests + 1), samples):
        name = uuid.uuid4().hex
        at: list[float] = []
        began = time.perf_counter()
        await stack.ask(
            new_prompt(length), _ANSWER, at, {"X-Request-Id": name, ROUTE_HEADER: route}
        )
        await stack.require_way(name, route)
        if number:  # the first of its kind warms up
            samples[route].append(_Sample(began, at))
    return [_row(length, route, found, times) for route, found in samples.items()]


def to_json(rows: Sequence[Row]) -> str:
    """One object for each length and way."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def format_route(rows: Sequence[Row]) -> str:
    """A table, two lines for each length."""
    head = ("prompt tokens", "way", "TTFT ms", "gap ms", "end to end", "others' ITL", "longest")
    lines = [
        (
            str(r.prompt_tokens), r.route, f"{r.ttft_ms:.1f}", f"{r.gap_ms:.1f}", f"{r.e2e_ms:.1f}",
            f"{r.others_itl_ms:.1f}", f"{r.others_longest_ms:.1f}",
        )
        for r in rows
    ]  # fmt: skip
    return format_table(head, lines)


def _row(length: int, route: str, samples: Sequence[_Sample], times: list[list[float]]) -> Row:
    between = [list(_between(own, sample)) for sample in samples for own in times]
    every = [gap for gaps in between for gap in gaps] or [0.0]
    longest = [max(gaps) for gaps in between if gaps] or [0.0]

    def ms(values: Sequence[float]) -> float:
        return round(1000 * statistics.median(values), 2)

    return Row(
        prompt_tokens=length,
        route=route,
        others=len(times),
        ttft_ms=ms([s.at[0] - s.began for s in samples]),
        gap_ms=ms([s.at[1] - s.at[0] for s in samples]),
        e2e_ms=ms([s.at[-1] - s.began for s in samples]),
        others_itl_ms=ms(every),
        others_longest_ms=ms(longest),
    )


def _between(times: Sequence[float], sample: _Sample) -> list[float]:
    """Gaps between tokens of another answer that end while `sample` waits for its second one."""
    return [
        later - earlier
        for earlier, later in itertools.pairwise(times)
        if sample.began <= later <= sample.at[1]
    ]
