"""What does a job's runner publish? With handlers that are stubs of vLLM's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI

from api.runner import RESTART, JobRunner
from pdtasks.cancelling import end
from pdtasks.jobs import Event, Job, JobStore


def a_chunk(text: str) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text}]}


class StubHandler:
    """Answers with fixed chunks; its whole answer says so."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        return self._stream() if request.stream else SimpleNamespace(model_dump=self._whole)

    async def _stream(self) -> AsyncGenerator[str, None]:
        for text in self._texts:
            yield f"data: {json.dumps(a_chunk(text))}\n\n"
        yield "data: [DONE]\n\n"

    def _whole(self) -> dict[str, Any]:
        return {"choices": [{"text": "".join(self._texts)}]}


class MemoryStore:
    """One job, in this process."""

    def __init__(self, published: list[dict[str, Any]], attempts: int) -> None:
        self.published = published
        self.ended: dict[str, Any] | None = None
        self.released = False
        self._job: Job | None = Job(
            id="job-1",
            path="/v1/completions",
            body={"model": "m", "prompt": "p"},
            state="queued",
            attempts=attempts,
            created_at=time.time(),
            deadline=time.time() + 60,
            ttl_s=60,
        )

    async def claim(self, token: str) -> Job | None:
        job, self._job = self._job, None
        return job

    async def events(self, job_id: str, *, after: str, block_s: float) -> list[Event]:
        rest = self.published[int(after) :]
        return [Event(str(n), json.dumps(c)) for n, c in enumerate(rest, int(after) + 1)]

    async def write(self, job: Job, event: str | None = None, **fields: Any) -> bool:
        if event is not None:
            self.published.append(json.loads(event))
        return True

    async def renew(self, job: Job) -> str:
        return "held"

    async def release(self, job: Job) -> None:
        self.released = True

    async def finish(self, job: Job, state: str, **fields: Any) -> bool:
        self.ended = {"state": state, **fields}
        return False  # and so nothing is told to Celery


def run(texts: list[str], published: list[dict[str, Any]], attempts: int) -> MemoryStore:
    store = MemoryStore(list(published), attempts)
    app = FastAPI()
    app.state.openai_serving_completion = StubHandler(texts)

    async def main() -> None:
        runner = JobRunner(app, cast("JobStore", store), concurrency=1)
        running = asyncio.create_task(runner.run())
        async with asyncio.timeout(10):
            while store.ended is None:  # noqa: ASYNC110 - the stub has no event
                await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(main())
    return store


def test_chunks_are_published_as_they_are() -> None:
    store = run(["a", "b"], [], attempts=1)

    assert store.published == [a_chunk("a"), a_chunk("b")]
    assert store.ended == {"state": "succeeded", "result": {"choices": [{"text": "ab"}]}}


@pytest.mark.parametrize("texts", [["ab", "cd"], ["a", "bc", "d"], ["abcd"]])
def test_a_second_run_goes_on_where_the_first_was(texts: list[str]) -> None:
    store = run(texts, [a_chunk("a"), a_chunk("b")], attempts=2)

    assert "".join(c["choices"][0]["text"] for c in store.published) == "abcd"


def test_another_answer_begins_anew() -> None:
    published = [a_chunk("a"), a_chunk("b")]

    store = run(["a", "x", "y"], published, attempts=2)

    assert store.published == [*published, RESTART, a_chunk("a"), a_chunk("x"), a_chunk("y")]
    assert store.ended == {"state": "succeeded", "result": {"choices": [{"text": "axy"}]}}


def test_a_third_run_goes_on_behind_the_restart() -> None:
    published = [a_chunk("a"), RESTART, a_chunk("x")]

    store = run(["xy"], published, attempts=3)

    assert store.published == [*published, a_chunk("y")]


def test_a_runner_that_stops_leaves_its_job_to_others() -> None:
    class HangingHandler(StubHandler):
        async def _stream(self) -> AsyncGenerator[str, None]:
            yield f"data: {json.dumps(a_chunk('a'))}\n\n"
            await asyncio.Event().wait()

    store = MemoryStore([], attempts=1)
    app = FastAPI()
    app.state.openai_serving_completion = HangingHandler([])

    async def main() -> None:
        runner = JobRunner(app, cast("JobStore", store), concurrency=1)
        running = asyncio.create_task(runner.run())
        async with asyncio.timeout(10):
            while not store.published:  # noqa: ASYNC110 - the stub has no event
                await asyncio.sleep(0.01)
        await end([running])

    asyncio.run(main())
    assert (store.released, store.ended) == (True, None)
