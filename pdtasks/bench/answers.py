"""What do n answers to one prompt cost, beside one answer and beside n prompts of their own?

Asked over HTTP of a running stack, one way after the other, each time with new prompts, so that
nothing is shared but what a request shares with itself.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from pdtasks.bench.asking import ask_stack, format_table, new_prompt
from pdtasks.settings import Settings

#: Tokens of each answer.
_ANSWER = 8

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """Medians of one way to ask, milliseconds."""

    way: str
    first_tokens_ms: float  #: until each answer has its first token
    end_to_end_ms: float
    computed_tokens: int  #: of prompts, by prefill, in one round


def run_answers(
    settings: Settings, answers: int, tokens: int, rounds: int, progress: Progress
) -> list[Row]:
    """Ask the stack that `settings` know. Raises NoWorker, saying what to do."""
    # Requests, and answers to each.
    ways = {
        "one answer": (1, 1),
        f"{answers} answers to one prompt": (1, answers),
        f"{answers} prompts, one answer each": (answers, 1),
    }

    async def ask(client: httpx.AsyncClient, model: str) -> list[Row]:
        found: dict[str, list[_Sample]] = {way: [] for way in ways}
        await _ask(client, model, tokens, 1, answers)  # warms up
        for number in range(rounds):
            for way, (requests, n) in ways.items():
                sample = await _ask(client, model, tokens, requests, n)
                found[way].append(sample)
                progress(f"round {number + 1}, {way}: {sample.end_to_end:.2f} s")
        return [_row(way, samples) for way, samples in found.items()]

    return ask_stack(settings, ask)


def to_json(rows: Sequence[Row]) -> str:
    """One object for each way."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def format_answers(rows: Sequence[Row]) -> str:
    """A table, a line for each way."""
    lines = [
        (r.way, f"{r.first_tokens_ms:.0f}", f"{r.end_to_end_ms:.0f}", str(r.computed_tokens))
        for r in rows
    ]
    return format_table(
        ("way", "first tokens ms", "end to end ms", "prompt tokens computed"), lines
    )


@dataclass(frozen=True)
class _Sample:
    first_tokens: float
    end_to_end: float
    computed: int


async def _ask(
    client: httpx.AsyncClient, model: str, tokens: int, requests: int, n: int
) -> _Sample:
    began = time.perf_counter()
    ends = await asyncio.gather(*(_ask_one(client, model, tokens, n) for _ in range(requests)))
    return _Sample(
        first_tokens=max(first for first, _, _ in ends) - began,
        end_to_end=max(end for _, end, _ in ends) - began,
        computed=sum(computed for _, _, computed in ends),
    )


async def _ask_one(
    client: httpx.AsyncClient, model: str, tokens: int, n: int
) -> tuple[float, float, int]:
    """When all answers of one request had a token, and their end; tokens that prefill computed."""
    name = uuid.uuid4().hex
    body: dict[str, Any] = {
        "model": model,
        "prompt": new_prompt(tokens),
        "n": n,
        "seed": 1,
        "max_tokens": _ANSWER,
        "ignore_eos": True,
        "temperature": 1,
        "stream": True,
        # Also of tokens that make no text.
        "logprobs": 0,
    }
    firsts: dict[int, float] = {}
    headers = {"X-Request-Id": name}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    firsts.setdefault(choice["index"], time.perf_counter())
    end = time.perf_counter()
    if len(firsts) < n:
        raise ValueError("not all answers came")
    report = await client.get(f"/pdtasks/requests/cmpl-{name}")
    stages = [one["prefill"] for one in report.raise_for_status().json()["sequences"]]
    computed = sum(stage["prompt_tokens"] - stage["cached_tokens"] for stage in stages)
    return max(firsts.values()), end, computed


def _row(way: str, samples: Sequence[_Sample]) -> Row:
    return Row(
        way=way,
        first_tokens_ms=round(1000 * statistics.median(s.first_tokens for s in samples), 1),
        end_to_end_ms=round(1000 * statistics.median(s.end_to_end for s in samples), 1),
        computed_tokens=round(statistics.median(s.computed for s in samples)),
    )
