"""What does a job's runner publish? With handlers that are stubs of vLLM's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import valkey
from fastapi import FastAPI

from api import claiming
from api.runner import RESTART, JobRunner
from pdtasks import background as background_module
from pdtasks.background import Background
from pdtasks.bus.jobs import Event, Job, JobStore, State
from tests.waiting import until


def a_chunk(text: str) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text}]}


class StubHandler:
    """Answers with fixed chunks; its whole answer says so."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self.times_asked = 0

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        self.times_asked += 1
        return self._stream() if request.stream else SimpleNamespace(model_dump=self._whole)

    async def _stream(self) -> AsyncGenerator[str, None]:
        for text in self._texts:
            yield f"data: {json.dumps(a_chunk(text))}\n\n"
        yield "data: [DONE]\n\n"

    def _whole(self) -> dict[str, Any]:
        return {"choices": [{"text": "".join(self._texts)}]}


class HangingHandler(StubHandler):
    """Never gets to its second chunk, and needs a while to clean up."""

    def __init__(self, clean_up_s: float = 0.0) -> None:
        super().__init__([])
        self._clean_up_s = clean_up_s
        self.times_cleaned_up = 0

    async def _stream(self) -> AsyncGenerator[str, None]:
        try:
            yield f"data: {json.dumps(a_chunk('a'))}\n\n"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(self._clean_up_s)
            self.times_cleaned_up += 1


def a_job(number: int = 1, **fields: Any) -> Job:
    now = time.time()
    made = Job(
        id=f"job-{number}",
        path="/v1/completions",
        body={"model": "m", "prompt": "canary-prompt"},
        state=State.QUEUED,
        attempts=1,
        created_at=now,
        deadline=now + 60,
        ttl_s=60,
    )
    return replace(made, **fields)


class MemoryStore:
    """A few jobs, in this process."""

    def __init__(self, *jobs: Job, published: list[dict[str, Any]] | None = None) -> None:
        self.published = published or []
        self.ended: dict[str, Any] | None = None
        self.released: list[str] = []
        self.release_s = 0.0
        self.claim_fails: list[Exception] = []
        self.write_fails: list[Exception] = []
        self._waiting = list(jobs)

    async def claim(self, token: str) -> Job | None:
        if self.claim_fails:
            raise self.claim_fails.pop()
        return self._waiting.pop(0) if self._waiting else None

    async def events(self, job_id: str, *, after: str, block_s: float) -> list[Event]:
        rest = self.published[int(after) :]
        return [Event(str(n), json.dumps(c)) for n, c in enumerate(rest, int(after) + 1)]

    async def write(self, job: Job, event: str | None = None, **fields: Any) -> bool:
        if self.write_fails:
            raise self.write_fails.pop()
        if event is not None:
            self.published.append(json.loads(event))
        return True

    async def renew(self, job: Job) -> str:
        return "held"

    async def release(self, job: Job) -> None:
        await asyncio.sleep(self.release_s)
        self.released.append(job.id)

    async def finish(self, job: Job, state: State, **fields: Any) -> bool:
        self.ended = {"state": state, **fields}
        return False  # and so nothing is told to Celery


@asynccontextmanager
async def a_runner(
    store: MemoryStore, handler: StubHandler, background: Background | None = None
) -> AsyncIterator[JobRunner]:
    app = FastAPI()
    app.state.openai_serving_completion = handler
    runner = JobRunner(
        app, cast("JobStore", store), concurrency=8, background=background or Background()
    )
    runner.start()
    try:
        yield runner
    finally:
        await runner.stop()
        assert runner.num_running == 0


def run_to_its_end(store: MemoryStore, handler: StubHandler) -> MemoryStore:
    async def main() -> None:
        async with a_runner(store, handler) as runner:
            await until(lambda: store.ended is not None)
            await until(lambda: runner.num_running == 0)

    asyncio.run(main())
    return store


def run(texts: list[str], published: list[dict[str, Any]], attempts: int) -> MemoryStore:
    store = MemoryStore(a_job(attempts=attempts), published=list(published))
    return run_to_its_end(store, StubHandler(texts))


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


def test_a_runner_that_stops_leaves_its_jobs_to_others_however_long_that_takes() -> None:
    # Given jobs whose requests need a while to clean up, on a bus that needs longer
    store = MemoryStore(*(a_job(number) for number in range(4)))
    store.release_s = 1.0
    handler = HangingHandler(clean_up_s=0.7)

    async def main() -> None:
        async with a_runner(store, handler) as runner:
            await until(lambda: len(store.published) == 4)

            # When it stops
            await runner.stop()

            # Then they can be claimed now
            assert runner.num_running == 0
            assert sorted(store.released) == [f"job-{number}" for number in range(4)]
            assert (handler.times_cleaned_up, store.ended) == (4, None)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_job_that_the_bus_gives_to_a_stopping_runner_is_left_to_others() -> None:
    store, handler = MemoryStore(), StubHandler(["a"])
    asked = asyncio.Event()

    async def claim(token: str) -> Job:
        asked.set()
        await asyncio.sleep(0.2)
        return a_job()

    async def main() -> None:
        async with a_runner(store, handler) as runner:
            await asked.wait()
            await runner.stop()

    store.claim = claim  # type: ignore[method-assign]
    asyncio.run(main())
    assert store.released == ["job-1"]
    assert handler.times_asked == 0


def test_a_handler_that_does_not_end_holds_up_a_stop_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claiming, "_CLEAN_UP_S", 0.1)
    store = MemoryStore(a_job())

    async def main() -> None:
        async with a_runner(store, HangingHandler(clean_up_s=2)) as runner:
            await until(lambda: store.published)
            async with asyncio.timeout(1):
                await runner.stop()
        assert store.released == ["job-1"]

    asyncio.run(main())


def test_something_unforeseen_fails_the_job_at_once(caplog: pytest.LogCaptureFixture) -> None:
    class OddHandler(StubHandler):
        def _whole(self) -> dict[str, Any]:
            raise KeyError("canary-" + "prompt")

    store = run_to_its_end(MemoryStore(a_job()), handler := OddHandler(["a"]))

    assert store.ended == {
        "state": "failed",
        "error": {
            "message": "an unforeseen KeyError ended the job",
            "type": "PdtasksError",
            "param": None,
            "code": 500,
        },
    }
    assert handler.times_asked == 2, "one for the chunks, one for the whole"
    assert "job-1 failed: KeyError at" in caplog.text
    assert "in _whole" in caplog.text
    assert "canary-prompt" not in caplog.text


def test_a_request_whose_chunks_cannot_be_used_leaves_the_engine_at_once() -> None:
    class OddChunks(HangingHandler):
        async def _stream(self) -> AsyncGenerator[str, None]:
            try:
                yield 'data: {"choices": [{}]}\n\n'
                await asyncio.Event().wait()
            finally:
                self.times_cleaned_up += 1

    # Given a second attempt, which looks into the chunks
    store = MemoryStore(a_job(attempts=2), published=[a_chunk("a")])

    run_to_its_end(store, handler := OddChunks())

    assert handler.times_cleaned_up == 1
    assert store.ended is not None
    assert store.ended["error"]["message"] == "an unforeseen KeyError ended the job"


def test_a_bus_that_goes_away_leaves_the_job_to_its_lease(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore(a_job())
    store.write_fails.append(valkey.TimeoutError("canary"))

    async def main() -> None:
        async with a_runner(store, HangingHandler()) as runner:
            await until(lambda: "job-1 is left, bus is away: TimeoutError" in caplog.text)
            await until(lambda: runner.num_running == 0)

    asyncio.run(main())
    assert (store.ended, store.released) == (None, [])


@pytest.mark.parametrize(
    ("fields", "state", "code"),
    [
        ({"deadline": 1.0}, "failed", ("RequestTimeout", 504)),
        ({"is_given_up": True}, "failed", ("WorkerLost", 503)),
        ({"is_unwanted": True}, "cancelled", None),
    ],
)
def test_a_job_without_a_chance_starts_no_work(
    fields: dict[str, Any], state: str, code: tuple[str, int] | None
) -> None:
    store = run_to_its_end(MemoryStore(a_job(**fields)), handler := StubHandler(["a"]))

    assert store.ended is not None
    assert store.ended["state"] == state
    error = store.ended.get("error")
    assert (error and (error["type"], error["code"])) == code
    assert handler.times_asked == 0
    assert store.published == []


def test_the_look_for_jobs_goes_on_after_a_surprise_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background_module, "_PAUSE_S", 0.3)
    beside = Background()
    store = MemoryStore(a_job())
    store.claim_fails.append(KeyError("surprise"))

    async def main() -> None:
        async with a_runner(store, StubHandler(["a"]), beside):
            await until(beside.problems)
            await until(lambda: store.ended)

    asyncio.run(main())
    assert store.ended is not None
    assert store.ended["state"] == "succeeded"
    assert beside.failures() == {"job-runner": 1}
    assert beside.problems() == []


def test_a_surprise_does_not_end_the_jobs_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_module, "_PAUSE_S", 0.01)
    beside = Background()
    store = MemoryStore(a_job())

    async def main() -> None:
        async with a_runner(store, HangingHandler(), beside) as runner:
            await until(lambda: store.published)
            store.claim_fails.append(KeyError("surprise"))
            runner.wake()
            await until(lambda: beside.failures()["job-runner"])

            assert runner.num_running == 1
            assert store.released == []

    asyncio.run(main())
    assert store.released == ["job-1"]
