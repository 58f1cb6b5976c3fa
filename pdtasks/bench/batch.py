"""What does a long batch cost, itself and those who wait meanwhile? `pdtasks bench batch`

A file of many lines goes through upload, check, workers and download, while somebody asks one
question after the other; what each part of the stack has in memory is sampled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from pdtasks.bench.asking import format_table
from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.stack import ChaosStack
from pdtasks.bench.chaos.stub import TOKENS
from pdtasks.bench.fair.clients import Tenant
from pdtasks.bench.latency import p50_p99_ms
from pdtasks.bench.loop_thread import LoopThread
from pdtasks.bench.overload.memory import Memory
from pdtasks.cluster.console import Console
from pdtasks.errors import PdtasksError

T = TypeVar("T")

_DEADLINE_S = 3600.0
_PROMPT, _ANSWER = 64, 8  # tokens of a line
_LOOK_S = 1.0
_PROGRESS_S = 10.0
_PAUSE_S = 0.1  # of who waits, between two questions
_URL = "/v1/completions"


@dataclass(frozen=True)
class Plan:
    """What one run is made of."""

    lines: int = 10_000
    concurrency: int = 32  #: lines that each API process runs at once
    seconds: float = 20.0  #: of questions alone, before the batch


@dataclass(frozen=True)
class Found:
    """What one run has shown."""

    lines: int
    answered: int  #: lines in the output file, each once
    failed: int  #: lines in the error file
    upload_s: float  #: until the file is taken
    seconds: float  #: from the batch's beginning to its end
    steps: Sequence[int]  #: different counts of lines done that were shown on the way
    live_ms: dict[str, tuple[float, float]]  #: p50, p99 of who waits: alone, beside the batch
    memory_mib: dict[str, tuple[int, int, int]]  #: before; at most in either half of the batch


def run_batch(plan: Plan, home: Path, console: Console, nursery: Nursery | None = None) -> Found:
    """Run `plan` on a stack of its own, with stub engines. Main thread only.

    Raises PdtasksError when the stack does not start, or refuses the batch.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log each request
    with (
        ChaosStack(
            home,
            "stub",
            console,
            deadline_s=_DEADLINE_S,
            nursery=nursery,
            batch_concurrency=plan.concurrency,
        ) as stack,
        LoopThread("clients") as thread,
    ):
        memory = Memory(stack.pids)

        def result_of(work: Future[T]) -> T:
            def is_done() -> bool:
                memory.look()
                return work.done()

            stack.wait(is_done)
            return work.result()

        def call(work: Coroutine[Any, Any, T]) -> T:
            return result_of(thread.call(work))

        urls, model = list(stack.urls.values()), stack.settings.model_name
        waiting = Tenant(urls, model, "")
        call(waiting.open())
        call(waiting.ask_for(1.0, _PAUSE_S))  # code is run for the first time
        memory.begin()
        alone = call(waiting.ask_for(plan.seconds, _PAUSE_S))
        before = {group: most for group, (_, most) in memory.most().items()}
        console.good(f"alone: {_told(alone)}")
        memory.begin()
        running = thread.call(_Batch(urls[0], model, plan.lines, console).run())
        beside: list[float] = []
        while not running.done():
            beside += call(waiting.ask_for(_LOOK_S, _PAUSE_S))
        done = result_of(running)
        console.good(f"beside the batch: {_told(beside)}")
        call(waiting.close())
    return Found(
        lines=plan.lines,
        live_ms={"alone": p50_p99_ms(alone), "beside the batch": p50_p99_ms(beside)},
        memory_mib={group: (before[group], *halves) for group, halves in memory.most().items()},
        **done,
    )


class _Batch:
    """One batch, from its file to its results."""

    def __init__(self, url: str, model: str, lines: int, console: Console) -> None:
        self._url = url
        self._model = model
        self._lines = lines
        self._console = console

    async def run(self) -> dict[str, Any]:
        """Raises PdtasksError when the batch does not end as it should."""
        timeout = aiohttp.ClientTimeout(total=_DEADLINE_S)
        async with aiohttp.ClientSession(self._url, timeout=timeout) as self._session:
            began = time.monotonic()
            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            form.add_field("file", self._file(), filename="lines.jsonl")
            file = await self._json("POST", "/v1/files", data=form)
            upload_s = time.monotonic() - began
            self._console.good(f"{file['bytes'] >> 10} KiB were taken after {upload_s:.1f} s")
            asked = {"input_file_id": file["id"], "endpoint": _URL, "completion_window": "24h"}
            began = time.monotonic()
            batch = await self._json("POST", "/v1/batches", json=asked)
            steps = set()
            told_at = began
            while batch["status"] in ("validating", "in_progress", "finalizing"):
                await asyncio.sleep(_LOOK_S)
                batch = await self._json("GET", f"/v1/batches/{batch['id']}")
                counts = batch["request_counts"]
                steps.add(counts["completed"] + counts["failed"])
                if time.monotonic() - told_at >= _PROGRESS_S:
                    told_at = time.monotonic()
                    self._console.line(f"{counts['completed']} of {self._lines} lines are done")
            if batch["status"] != "completed":
                raise PdtasksError(f"the batch is {batch['status']}: {batch['errors']}")
            seconds = time.monotonic() - began
            self._console.good(f"the batch was done after {seconds:.0f} s")
            names = await self._names_in(batch["output_file_id"])
            failed = await self._names_in(batch["error_file_id"])
        return {
            "answered": len(set(names)) if len(set(names)) == len(names) else -1,
            "failed": len(failed),
            "upload_s": round(upload_s, 2),
            "seconds": round(seconds, 1),
            "steps": sorted(steps),
        }

    async def _file(self) -> AsyncIterator[bytes]:
        rng = random.Random(1)  # noqa: S311 - for prompts
        for number in range(self._lines):
            body = {
                "model": self._model,
                "prompt": rng.choices(TOKENS, k=_PROMPT),
                "max_tokens": _ANSWER,
                "ignore_eos": True,
            }
            line = {"custom_id": f"line-{number}", "method": "POST", "url": _URL, "body": body}
            yield json.dumps(line).encode() + b"\n"

    async def _names_in(self, file_id: str | None) -> list[str]:
        if file_id is None:
            return []
        async with self._session.get(f"/v1/files/{file_id}/content") as answer:
            answer.raise_for_status()
            return [json.loads(line)["custom_id"] async for line in answer.content]

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        async with self._session.request(method, path, **options) as answer:
            if answer.status != 200:
                raise PdtasksError(f"{path} answers {answer.status}: {await answer.text()}")
            found: dict[str, Any] = await answer.json()
            return found


def to_json(found: Found) -> str:
    """One object."""
    return json.dumps(asdict(found), indent=1)


def format_batch(found: Found) -> str:
    """What happened to the lines, who waited, and what it took of memory."""
    told = (
        f"{found.answered} of {found.lines} lines answered, {found.failed} failed, in "
        f"{found.seconds:.0f} s; upload {found.upload_s:.1f} s; {len(found.steps)} steps shown"
    )
    lines = [
        told,
        format_table(
            ("who waits", "p50, ms", "p99, ms"),
            [(way, f"{p50:.0f}", f"{p99:.0f}") for way, (p50, p99) in found.live_ms.items()],
        ),
        format_table(
            ("MiB", "before", "first half", "second half"),
            [(group, *map(str, mib)) for group, mib in found.memory_mib.items()],
        ),
    ]
    return "\n\n".join(lines)


def _told(took_s: Sequence[float]) -> str:
    p50, p99 = p50_p99_ms(took_s)
    return f"{len(took_s)} answers, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
