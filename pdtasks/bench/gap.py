"""How long is the gap between the first token and the second, beside a normal one?

The first token comes from prefill, the second from decode: between them lies the hand-over.  Asked
over HTTP of a running stack, one request after the other, each with a prompt of its own, so that
nothing is shared; what the stages say of each is in the row too.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from pdtasks.bench.asking import ROUTE_HEADER, ask_stack, format_table, new_prompt, stream_tokens
from pdtasks.settings import Settings

#: Tokens of each answer.
_ANSWER = 24

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """Medians of one length, milliseconds."""

    prompt_tokens: int
    ttft_ms: float
    itl_ms: float  #: between tokens of decode
    gap_ms: float  #: from the first token to the second
    worst_gap_ms: float
    save_ms: float  #: until prefill's blocks could be read by others
    load_ms: float
    publish_ms: float  #: from the end of prefill to the start of decode
    recomputed_blocks: int  #: of all requests


@dataclass(frozen=True)
class _Sample:
    ttft: float
    gap: float
    itl: float
    save: float
    load: float
    publish: float
    recomputed: int


def run_gap(
    settings: Settings, lengths: Sequence[int], requests: int, progress: Progress
) -> list[Row]:
    """Ask the stack that `settings` know. Raises NoWorker, saying what to do."""

    async def ask(client: httpx.AsyncClient, model: str) -> list[Row]:
        rows = []
        for length in lengths:
            await _ask(client, model, length)  # the first of its kind warms up
            samples = [await _ask(client, model, length) for _ in range(requests)]
            rows.append(_row(length, samples))
            progress(f"{length} tokens: gap {rows[-1].gap_ms:.1f} ms")
        return rows

    return ask_stack(settings, ask)


def to_json(rows: Sequence[Row]) -> str:
    """One object for each length."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def format_gap(rows: Sequence[Row]) -> str:
    """A table, a line for each length."""
    head = (
        "prompt tokens", "TTFT ms", "ITL ms", "gap ms", "worst", "save ms", "load ms",
        "publish ms", "recomputed",
    )  # fmt: skip
    lines = [
        (
            str(r.prompt_tokens), f"{r.ttft_ms:.1f}", f"{r.itl_ms:.1f}", f"{r.gap_ms:.1f}",
            f"{r.worst_gap_ms:.1f}", f"{r.save_ms:.1f}", f"{r.load_ms:.1f}",
            f"{r.publish_ms:.1f}", str(r.recomputed_blocks),
        )
        for r in rows
    ]  # fmt: skip
    return format_table(head, lines)


async def _ask(client: httpx.AsyncClient, model: str, length: int) -> _Sample:
    name = uuid.uuid4().hex
    prompt, at = new_prompt(length), list[float]()
    headers = {"X-Request-Id": name, ROUTE_HEADER: "split"}
    began = time.perf_counter()
    await stream_tokens(client, model, prompt, _ANSWER, at=at, headers=headers)
    report = await client.get(f"/pdtasks/requests/cmpl-{name}")
    (stages,) = report.raise_for_status().json()["sequences"]
    between = [later - earlier for earlier, later in itertools.pairwise(at)]
    return _Sample(
        ttft=at[0] - began,
        gap=between[0],
        itl=statistics.median(between[1:]),
        save=stages["prefill"]["kv_seconds"],
        load=stages["decode"]["kv_seconds"],
        publish=stages["decode"]["queue_s"],
        recomputed=stages["decode"]["kv_blocks_recomputed"],
    )


def _row(length: int, samples: Sequence[_Sample]) -> Row:
    def median_ms(value: Callable[[_Sample], Any]) -> float:
        return round(1000 * float(statistics.median(value(sample) for sample in samples)), 2)

    return Row(
        prompt_tokens=length,
        ttft_ms=median_ms(lambda s: s.ttft),
        itl_ms=median_ms(lambda s: s.itl),
        gap_ms=median_ms(lambda s: s.gap),
        worst_gap_ms=round(1000 * max(s.gap for s in samples), 2),
        save_ms=median_ms(lambda s: s.save),
        load_ms=median_ms(lambda s: s.load),
        publish_ms=median_ms(lambda s: s.publish),
        recomputed_blocks=sum(s.recomputed for s in samples),
    )
