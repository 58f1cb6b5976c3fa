"""How do benches ask the stack that runs?"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

import httpx
import msgspec

from pdtasks.cluster.children import api_url
from pdtasks.errors import InvalidRequest, NoWorker
from pdtasks.settings import Settings

T = TypeVar("T")

#: Prompts are made of these token ids, which every tokenizer has as ordinary ones.
_VOCABULARY = range(300, 2300)
_TIMEOUT_S = 300.0
#: Says whether a request goes through both stages, `split`, or to one worker, `whole`.
ROUTE_HEADER: Final = "X-Pdtasks-Route"
#: Characters of a refusal that are shown.
_MOST_TOLD = 300


def new_prompt(length: int) -> list[int]:
    """So many tokens that no other prompt has."""
    return random.choices(_VOCABULARY, k=length)  # noqa: S311 - not a secret


def ask_stack(settings: Settings, ask: Callable[[httpx.AsyncClient, str], Awaitable[T]]) -> T:
    """`ask` the stack that `settings` know, with a client of it and its model's name.

    Raises NoWorker, saying what to do, when no stack answers, or not as one of pdtasks;
    InvalidRequest, with the stack's own words, when it refuses a request.
    """
    # httpx logs each request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    url = api_url(settings)

    async def run() -> T:
        async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
            try:
                alive = (await client.get("/v1/models")).json()["data"]
                if not alive:
                    raise NoWorker(f"no model of the stack at {url} has workers: `pdtasks status`")
                return await ask(client, str(alive[0]["id"]))
            except httpx.HTTPStatusError as exc:
                raise InvalidRequest(await _refusal(url, exc.response)) from exc
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as exc:
                raise NoWorker(
                    f"no stack of pdtasks answers at {url} ({type(exc).__name__}): start one with "
                    "`pdtasks up`, or say with PDTASKS_HOME which one is meant"
                ) from exc

    return asyncio.run(run())


async def stream_tokens(
    client: httpx.AsyncClient,
    model: str,
    prompt: list[int],
    answer: int,
    *,
    at: list[float],
    headers: dict[str, str],
) -> None:
    """Have `answer` tokens streamed; when each came (`time.perf_counter`) is added to `at` at once.

    Raises httpx.HTTPError.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": answer,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        # Also of tokens that make no text.
        "logprobs": 0,
    }
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                num_tokens = len(json.loads(line[6:])["choices"][0]["logprobs"]["tokens"])
                at += [time.perf_counter()] * num_tokens


async def _refusal(url: str, response: httpx.Response) -> str:
    told = response.reason_phrase
    with suppress(httpx.StreamError, ValueError, LookupError, TypeError):  # closed, or other words
        told = (await response.aread()).decode(errors="replace")
        told = str(msgspec.json.decode(told)["error"]["message"])
    return f"{url} answers {response.status_code}: {told[:_MOST_TOLD]}"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line for each row, columns to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
