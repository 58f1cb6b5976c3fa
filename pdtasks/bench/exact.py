"""Does an answer depend on what else is in the engines' steps?

Kernels compute a request in other shapes when it has company, and then the last bits of its numbers
may be others.  How far that goes depends on dtype, processor and kernels: here it is measured.
Asked over HTTP of a running stack: greedy answers, each prompt alone, alone once more, and all at
once.  Nothing is shared between the three (`cache_salt`): each time the prompt is computed anew.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from pdtasks.bench.asking import ask_stack, format_table, new_prompt
from pdtasks.settings import Settings

Progress = Callable[[str], None]

#: Token ids, and the logprob of each.
Answer = tuple[list[str], list[float]]


@dataclass(frozen=True)
class Row:
    """One way to ask, compared with the first answers."""

    way: str
    answers: int
    same_tokens: int  #: answers, all of whose tokens are the same
    same_bits: int  #: and all of whose logprobs are
    largest_difference: float  #: of logprobs, up to the first token that is another


def run_exact(
    settings: Settings, prompts: int, tokens: int, answer: int, progress: Progress
) -> list[Row]:
    """Ask the stack that `settings` know, for `answer` tokens each time.

    Raises NoWorker, saying what to do.
    """
    asked = [new_prompt(tokens) for _ in range(prompts)]

    async def ask(client: httpx.AsyncClient, model: str) -> list[Row]:
        def one(prompt: list[int]) -> Any:
            return _ask(client, model, prompt, answer)

        first = [await one(prompt) for prompt in asked]
        progress(f"{prompts} answers, one after the other")
        again = [await one(prompt) for prompt in asked]
        progress("the same once more")
        together = await asyncio.gather(*map(one, asked))
        progress("all at once")
        return [_compare("alone again", first, again), _compare("at once", first, together)]

    return ask_stack(settings, ask)


def to_json(rows: Sequence[Row]) -> str:
    """One object for each way."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def format_exact(rows: Sequence[Row]) -> str:
    """A table, a line for each way."""
    lines = [
        (
            r.way,
            f"{r.same_tokens} of {r.answers}",
            f"{r.same_bits} of {r.answers}",
            f"{r.largest_difference:.1e}",
        )
        for r in rows
    ]
    return format_table(("asked", "same tokens", "same logprobs", "largest difference"), lines)


async def _ask(client: httpx.AsyncClient, model: str, prompt: list[int], answer: int) -> Answer:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": answer,
        "ignore_eos": True,
        "temperature": 0,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
        "cache_salt": uuid.uuid4().hex,
    }
    response = await client.post("/v1/completions", json=body)
    found = response.raise_for_status().json()["choices"][0]["logprobs"]
    return found["tokens"], found["token_logprobs"]


def _compare(way: str, expected: Sequence[Answer], found: Sequence[Answer]) -> Row:
    differences = [0.0]
    for (tokens, logprobs), (others, other_logprobs) in zip(expected, found, strict=True):
        pairs = zip(tokens, others, logprobs, other_logprobs, strict=True)
        for token, other, logprob, other_logprob in pairs:
            if token != other:
                break
            differences.append(abs(logprob - other_logprob))
    pairs_of = list(zip(expected, found, strict=True))
    return Row(
        way=way,
        answers=len(pairs_of),
        same_tokens=sum(one[0] == other[0] for one, other in pairs_of),
        same_bits=sum(one == other for one, other in pairs_of),
        largest_difference=max(differences),
    )
