"""What becomes of a batch? The API's routes and runners on a real bus, with stubs of vLLM's."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import valkey
from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError

from api import batch_runner, batches, errors, files
from api.access import Access
from api.client import PipelineHTTPError
from api.main import _running_jobs
from api.parameters import Parameters
from pdtasks.background import Background
from pdtasks.bus import batches as bus_batches
from pdtasks.bus.batches import BatchStore, Line
from pdtasks.bus.connection import connect_async
from pdtasks.bus.files import FileStore
from pdtasks.bus.jobs import JobStore
from pdtasks.cluster.rights import User
from pdtasks.errors import BrokerUnavailable, PdtasksError, WorkerLost
from pdtasks.keys import Keys
from pdtasks.settings import Settings
from tests.integration.conftest import Services
from tests.waiting import until

MODEL = "m"
CHAT = "/v1/chat/completions"


class Answer:
    """As vLLM's models are dumped."""

    error = None

    def __init__(self, text: str) -> None:
        self._text = text

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {"object": "chat.completion", "choices": [{"message": {"content": self._text}}]}


class Handler:
    """vLLM's handler of chats: says what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.most_at_once = 0
        self.at_once = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.raises: list[PdtasksError] = []

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        text = request.messages[-1]["content"]
        self.asked[text] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.may_answer.wait()
            await asyncio.sleep(0)
        finally:
            self.at_once -= 1
        if self.raises:
            raise PipelineHTTPError(self.raises.pop())
        if text == "bad":
            raise VLLMValidationError("that cannot be", parameter="messages")
        if text == "odd":
            raise KeyError("odd")
        return Answer(text)

    def create_error_response(self, exc: Exception) -> Any:
        return create_error_response(exc)


@pytest.fixture
def settings(services: Services) -> Settings:
    services.bus.flushall()
    return Settings(
        bus_url=services.bus_server.url_for(User.API),
        served_model_name=MODEL,
        max_file_bytes=64 << 20,
        max_body_bytes=8192,
    )


@asynccontextmanager
async def an_api(
    settings: Settings, handler: Handler, keys: str = ""
) -> AsyncIterator[httpx.AsyncClient]:
    """An API process: its routes and its runners, without vLLM's."""
    app = FastAPI()
    for router in (files.router, batches.router):
        app.include_router(router)
    app.state.openai_serving_chat = handler
    errors.install(app)

    async def nothing(_: Any) -> None:
        pass

    app.add_middleware(cast("Any", Access), keys=Keys(None, keys), begin=nothing)
    transport = httpx.ASGITransport(app)
    async with (
        _running_jobs(app, settings, Background(), Parameters(priorities=False)),
        httpx.AsyncClient(transport=transport, base_url="http://api", timeout=30) as client,
    ):
        yield client


def run(test: Coroutine[Any, Any, None], within_s: float = 30) -> None:
    async def main() -> None:
        async with asyncio.timeout(within_s):
            await test

    asyncio.run(main())


def a_line(custom_id: str, text: str = "hello", **changes: Any) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    line = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes
    return json.dumps(line)


def some_lines(count: int) -> list[str]:
    return [a_line(f"id-{number}", f"text {number}") for number in range(count)]


async def upload(client: httpx.AsyncClient, content: Any, **headers: str) -> dict[str, Any]:
    if isinstance(content, list):
        content = "\n".join(content).encode()
    response = await client.post(
        "/v1/files",
        data={"purpose": "batch"},
        files={"file": ("in.jsonl", content)},
        headers=headers,
    )
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def begin(client: httpx.AsyncClient, content: Any, **headers: str) -> dict[str, Any]:
    file = await upload(client, content, **headers)
    order = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    response = await client.post("/v1/batches", json=order, headers=headers)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert found["status"] == "validating"
    return found


async def look(client: httpx.AsyncClient, batch: dict[str, Any], **headers: str) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
    return found


async def becomes(
    client: httpx.AsyncClient, batch: dict[str, Any], status: str, **headers: str
) -> dict[str, Any]:
    while (found := await look(client, batch, **headers))["status"] != status:
        assert found["status"] in ("validating", "in_progress", "finalizing", "cancelling"), found
        await asyncio.sleep(0.02)
    return found


async def lines_of(client: httpx.AsyncClient, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    response = await client.get(f"/v1/files/{file_id}/content")
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


async def outcomes(
    client: httpx.AsyncClient, batch: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of the output file, and of the error file."""
    return (
        await lines_of(client, batch["output_file_id"]),
        await lines_of(client, batch["error_file_id"]),
    )


# -- the whole way ---------------------------------------------------------------------------------


def test_a_batch_is_run_and_each_line_has_its_outcome(settings: Settings) -> None:
    async def test() -> None:
        async with an_api(settings, Handler()) as client:
            texts = ["hello", "bad", "odd", "wörld"]
            lines = [a_line(f"id-{n}", text) for n, text in enumerate(texts)]
            lines.append(a_line("id-4", body={"model": MODEL, "messages": 5}))
            batch = await becomes(client, await begin(client, [*lines, ""]), "completed")

            assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
            assert batch["model"] == MODEL
            times = [
                batch[f"{n}_at"] for n in ("created", "in_progress", "finalizing", "completed")
            ]
            assert times == sorted(times)
            right, wrong = await outcomes(client, batch)
            assert {o["custom_id"]: o["response"]["body"]["choices"] for o in right} == {
                "id-0": [{"message": {"content": "hello"}}],
                "id-3": [{"message": {"content": "wörld"}}],
            }
            assert all(o["response"]["status_code"] == 200 and not o["error"] for o in right)
            assert len({o["id"] for o in right + wrong}) == 5
            responses = {o["custom_id"]: o["response"] for o in wrong}
            assert {name: r["status_code"] for name, r in responses.items()} == {
                "id-1": 400,
                "id-2": 500,
                "id-4": 400,
            }
            assert "that cannot be" in responses["id-1"]["body"]["error"]["message"]

    run(test())


def test_what_is_wrong_in_a_file_is_told_by_line(settings: Settings) -> None:
    handler = Handler()
    wrong = [
        ("no json", "invalid_json_line"),
        ("[]", "invalid_json_line"),
        (a_line("a", "\ud800"), "invalid_json_line"),
        ("[" * 5000, "invalid_json_line"),
        (a_line("right"), None),
        (a_line("right"), "duplicate_custom_id"),
        (a_line("b", url="/v1/completions"), "invalid_url"),
        (a_line("c", method="GET"), "invalid_method"),
        (a_line("d", body={"model": "other"}), "mismatched_model"),
        (a_line("e", body={"messages": []}), "missing_required_parameter"),
        (a_line("f", body=None), "missing_required_parameter"),
        (a_line(cast("str", 5)), "invalid_type"),
        (a_line("g" * 513), "invalid_type"),
        (a_line("h", "x" * 9000), "line_too_long"),
        ("", None),
        (a_line("i", method="GET"), "invalid_method"),
    ]

    async def test() -> None:
        async with an_api(settings, handler) as client:
            batch = await becomes(
                client, await begin(client, [line for line, _ in wrong]), "failed"
            )

            told = [(error["line"], error["code"]) for error in batch["errors"]["data"]]
            assert told == [(n, code) for n, (_, code) in enumerate(wrong, 1) if code]
            assert batch["output_file_id"] is None
            assert batch["failed_at"]

            for nothing in (b"\n", b" \n\n"):
                batch = await becomes(client, await begin(client, nothing), "failed")
                assert [e["code"] for e in batch["errors"]["data"]] == ["empty_file"]

    run(test())
    assert not handler.asked


def test_a_batch_that_is_cancelled_ends_what_runs_and_begins_nothing(settings: Settings) -> None:
    handler = Handler()

    async def test() -> None:
        async with an_api(settings, handler) as client:
            batch = await begin(client, some_lines(500))
            await becomes(client, batch, "in_progress")
            await until(lambda: sum(handler.asked.values()) >= 100)
            handler.may_answer.clear()

            cancelling = await client.post(f"/v1/batches/{batch['id']}/cancel")
            assert cancelling.json()["status"] in ("cancelling", "cancelled")
            batch = await becomes(client, batch, "cancelled")

            right, wrong = await outcomes(client, batch)
            assert len(right) >= 90
            assert {o["error"]["code"] for o in wrong} == {"batch_cancelled"}
            assert sorted(o["custom_id"] for o in right + wrong) == sorted(
                f"id-{n}" for n in range(500)
            )
            assert handler.at_once == 0
            # once more changes nothing
            again = (await client.post(f"/v1/batches/{batch['id']}/cancel")).json()
            assert again == batch

    run(test())


def test_what_has_not_begun_in_its_window_has_expired(
    settings: Settings, services: Services
) -> None:
    handler = Handler()
    handler.may_answer.clear()

    async def test() -> None:
        async with an_api(settings, handler) as client:
            batch = await begin(client, some_lines(20))
            await until(lambda: handler.at_once == settings.batch_concurrency)

            services.bus.hset(f"pd:batch:{batch['id']}", "expires_at", str(int(time.time()) - 1))
            batch = await becomes(client, batch, "expired")

            _, wrong = await outcomes(client, batch)
            assert {o["error"]["code"] for o in wrong} == {"batch_expired"}
            assert len({o["custom_id"] for o in wrong}) == len(wrong) == 20
            assert batch["request_counts"] == {"total": 20, "completed": 0, "failed": 20}

    run(test())


# -- who goes first, and how many ------------------------------------------------------------------


def test_no_line_is_begun_while_a_job_waits(settings: Settings) -> None:
    handler = Handler()

    async def test() -> None:
        async with AsyncExitStack() as ends:
            client = await ends.enter_async_context(an_api(settings, handler))
            bus = await ends.enter_async_context(connect_async(settings))
            batch = await becomes(client, await begin(client, some_lines(1)), "completed")
            file_id = batch["input_file_id"]
        handler.asked.clear()
        async with connect_async(settings) as bus:
            jobs, store = JobStore(bus, ttl_s=60), BatchStore(bus, ttl_s=60)
            made = await store.create(CHAT, file_id)
            tended = await store.tend("t")
            assert tended is not None
            place = bus_batches.Place(1, 0, 5, "a")
            assert await store.write(tended, [place], lease_s=0, status="in_progress", total=1)

            job = await jobs.create(CHAT, {"messages": []}, timeout_s=60)
            assert await store.claim("1") is None
            assert (await jobs.claim("runner")) is not None
            line = await store.claim("2")
            assert line is not None
            assert (line.batch.id, line.place) == (made.id, place)
            assert job.id

    run(test())


def test_those_with_fewer_lines_under_way_get_the_next(settings: Settings) -> None:
    async def test() -> None:
        async with connect_async(settings) as bus:
            store, kept = BatchStore(bus, ttl_s=60), FileStore(bus, ttl_s=60)
            owner_of = {}
            for owner in ("many", "many", "many", "few"):
                async with kept.upload() as sent:
                    await sent.write(b"x")
                    file = await sent.keep(filename="f", purpose="batch", owner=owner, ttl_s=60)
                owner_of[(await store.create(CHAT, file.id, owner=owner)).id] = owner
                batch = await store.tend("t")
                assert batch is not None
                places = [bus_batches.Place(n, 0, 1, str(n)) for n in range(1, 11)]
                assert await store.write(batch, places, lease_s=0, status="in_progress", total=10)

            claimed = [await store.claim(str(number)) for number in range(12)]

            of_batch = Counter(line.batch.id for line in claimed if line)
            by_owner = Counter(owner_of[name] for name in of_batch.elements())
            assert by_owner == {"many": 6, "few": 6}
            assert sorted(of_batch.values()) == [2, 2, 2, 6]

    run(test())


def test_ten_thousand_lines_are_some_at_once_and_show_how_far_they_are(
    settings: Settings, services: Services, tmp_path: Path
) -> None:
    handler = Handler()
    count = 10_000
    path = tmp_path / "in.jsonl"
    with path.open("w") as out:
        for number in range(count):
            out.write(a_line(f"id-{number}", f"{number} " + "x" * 1500) + "\n")
    size = path.stat().st_size
    seen: list[int] = []

    async def test() -> None:
        async with an_api(settings, handler) as client:
            tracemalloc.start()
            with path.open("rb") as content:
                batch = await begin(client, content)
            await becomes(client, batch, "in_progress")
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            # Neither the upload nor the check has had the file in this process
            assert most < size / 2, f"{most >> 10} of {size >> 10} KiB"

            while not seen or seen[-1] < 300:
                found = await look(client, batch)
                assert found["request_counts"]["total"] == count
                seen.append(found["request_counts"]["completed"])
                running = services.bus.zcard(f"pd:batch:{batch['id']}:running")
                assert cast("int", running) <= settings.batch_concurrency
                await asyncio.sleep(0.05)
            await client.post(f"/v1/batches/{batch['id']}/cancel")
            batch = await becomes(client, batch, "cancelled")

            right, wrong = await outcomes(client, batch)
            assert len(right) >= 300
            assert len({o["custom_id"] for o in right + wrong}) == len(right + wrong) == count
            counts = {"total": count, "completed": len(right), "failed": len(wrong)}
            assert batch["request_counts"] == counts

    run(test(), 60)
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert handler.most_at_once <= settings.batch_concurrency
    assert set(handler.asked.values()) == {1}


# -- what is lost ----------------------------------------------------------------------------------


def test_the_outcome_of_a_line_is_written_once_whoever_comes_late(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_batches, "LEASE_S", 0.1)

    async def test() -> None:
        async with connect_async(settings) as bus:
            store, kept = BatchStore(bus, ttl_s=60), FileStore(bus, ttl_s=60)
            async with kept.upload() as sent:
                await sent.write(b"x")
                file = await sent.keep(filename="f", purpose="batch", owner="", ttl_s=60)
            await store.create(CHAT, file.id)
            batch = await store.tend("t")
            assert batch is not None
            place = bus_batches.Place(1, 0, 1, "a")
            assert await store.write(batch, [place], lease_s=0, status="in_progress", total=1)

            # Given a line whose runner stands still, and another one that has it now
            frozen = await store.claim("frozen")
            own: Line | None = None
            while own is None:
                own = await store.claim("own")
                await asyncio.sleep(0.01)
            assert frozen is not None
            assert own.tries == 2

            # When the first one wakes up, it can change nothing
            assert await store.renew(frozen) == "lost"
            assert await store.finish(frozen, "output", "frozen\n") == "refused"
            await store.release(frozen)
            assert await store.renew(own) == "held"
            assert await store.finish(own, "output", "own\n") == "last"
            assert await store.finish(own, "output", "own\n") == "refused"
            assert await store.finish(frozen, "output", "frozen\n") == "refused"

            # Then there is one outcome
            batch = await store.tend("t2")
            assert batch is not None
            assert (batch.completed, batch.failed) == (1, 0)
            assert await store.end(batch, bus_batches.Status.COMPLETED)
            ended = await store.get(batch.id)
            assert ended is not None
            assert ended.output_file_id is not None
            output = await kept.get(ended.output_file_id)
            assert output is not None
            assert [piece async for piece in kept.pieces(output)] == [b"own\n"]

    run(test())


def test_an_api_that_stops_leaves_its_lines_to_another(settings: Settings) -> None:
    first, second = Handler(), Handler()
    first.may_answer.clear()

    async def test() -> None:
        async with an_api(settings, first) as client:
            batch = await begin(client, some_lines(30))
            await until(lambda: first.at_once == settings.batch_concurrency)
            began = time.monotonic()
        async with an_api(settings, second) as client:
            batch = await becomes(client, batch, "completed")

            assert time.monotonic() - began < 8  # nobody waited for a lease
            right, _ = await outcomes(client, batch)
            assert len({o["custom_id"] for o in right}) == len(right) == 30

    run(test())


def test_a_killed_api_process_loses_no_line_and_doubles_none(
    settings: Settings, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_batches, "LEASE_S", 2.0)
    own = Handler()
    own.may_answer.clear()

    class AnswersTen(Handler):
        async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
            if sum(self.asked.values()) >= 10:
                self.may_answer.clear()
            return await super().create_chat_completion(request, raw_request)

    async def be_an_api() -> None:
        async with an_api(settings, AnswersTen()):
            await asyncio.Event().wait()

    async def test(other: int) -> None:
        async with an_api(settings, own) as client:
            # Given two processes that run a batch
            batch = await begin(client, some_lines(40))
            name = f"pd:batch:{batch['id']}"
            await until(
                lambda: services.bus.zcard(f"{name}:running") == 2 * settings.batch_concurrency
            )
            await until(lambda: int(cast("bytes", services.bus.hget(name, "completed")) or 0) == 10)

            # When one is killed
            os.kill(other, signal.SIGKILL)
            own.may_answer.set()

            # Then the other one runs what that had, and the rest
            batch = await becomes(client, batch, "completed")
            assert batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
            right, _ = await outcomes(client, batch)
            assert len({o["custom_id"] for o in right}) == len(right) == 40
            assert (len(own.asked), set(own.asked.values())) == (30, {1})

    other = os.fork()
    if other == 0:
        try:
            asyncio.run(be_an_api())
        finally:
            os._exit(1)
    try:
        run(test(other))
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


def test_a_line_waits_for_better_times_but_not_if_it_may_be_to_blame(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "_RETRY_S", 0.01)
    handler = Handler()

    async def test() -> None:
        async with an_api(settings, handler) as client:
            handler.raises = [BrokerUnavailable("away") for _ in range(20)]
            batch = await becomes(client, await begin(client, [a_line("a")]), "completed")
            assert batch["request_counts"]["completed"] == 1

            handler.asked.clear()
            handler.raises = [WorkerLost("every worker that took it died") for _ in range(20)]
            batch = await becomes(client, await begin(client, [a_line("a")]), "completed")
            assert handler.asked == {"hello": 3}
            _, (wrong,) = await outcomes(client, batch)
            assert wrong["response"]["status_code"] == 503

    run(test())


def test_outcomes_wait_for_a_bus_that_is_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "_RETRY_S", 0.01)
    finish = BatchStore.finish
    failures = [valkey.TimeoutError("canary") for _ in range(3)]

    async def seldom(self: BatchStore, *args: Any) -> Any:
        done = await finish(self, *args)
        if failures:  # it was written, and nobody hears of it
            raise failures.pop()
        return done

    monkeypatch.setattr(BatchStore, "finish", seldom)
    handler = Handler()

    async def test() -> None:
        async with an_api(settings, handler) as client:
            batch = await becomes(client, await begin(client, some_lines(2)), "completed")
            right, _ = await outcomes(client, batch)
            assert sorted(o["custom_id"] for o in right) == ["id-0", "id-1"]

    run(test())
    assert set(handler.asked.values()) == {1}


# -- files, and whose they are ---------------------------------------------------------------------


def test_what_one_key_has_made_is_not_there_for_another(settings: Settings) -> None:
    async def test() -> None:
        async with an_api(settings, Handler(), keys="secret-a,secret-b") as client:
            alice = {"Authorization": "Bearer secret-a"}
            bob = {"Authorization": "Bearer secret-b"}
            batch = await begin(client, some_lines(2), **alice)
            batch = await becomes(client, batch, "completed", **alice)
            bobs = await begin(client, some_lines(1), **bob)

            for path in (
                *(f"/v1/batches/{batch['id']}", f"/v1/files/{batch['output_file_id']}"),
                *(f"/v1/files/{batch['input_file_id']}{end}" for end in ("", "/content")),
            ):
                assert (await client.get(path, headers=bob)).status_code == 404
                assert (await client.get(path, headers=alice)).status_code == 200
                assert (await client.get(path)).status_code == 401
            for method, path in (
                ("POST", f"/v1/batches/{batch['id']}/cancel"),
                ("DELETE", f"/v1/files/{batch['input_file_id']}"),
            ):
                assert (await client.request(method, path, headers=bob)).status_code == 404
            order = {"input_file_id": batch["input_file_id"], "endpoint": CHAT}
            order["completion_window"] = "24h"
            stolen = await client.post("/v1/batches", json=order, headers=bob)
            assert stolen.status_code == 404
            listed = (await client.get("/v1/batches", headers=bob)).json()["data"]
            assert [one["id"] for one in listed] == [bobs["id"]]
            listed = (await client.get("/v1/files", headers=alice)).json()["data"]
            assert {one["id"] for one in listed} == {
                batch["input_file_id"],
                batch["output_file_id"],
            }

    run(test())


def test_files_come_back_as_they_were_and_go_when_nobody_reads_them(
    settings: Settings, services: Services
) -> None:
    handler = Handler()
    content = "\n".join(some_lines(20_000)).encode() + b"\r\n--x\r\n"  # more than one piece

    async def test() -> None:
        async with an_api(settings, handler) as client:
            file = await upload(client, content)
            assert file["bytes"] == len(content)
            assert file["filename"] == "in.jsonl"
            assert (await client.get(f"/v1/files/{file['id']}")).json() == file
            assert (await client.get(f"/v1/files/{file['id']}/content")).content == content
            deleted = (await client.delete(f"/v1/files/{file['id']}")).json()
            assert deleted == {"id": file["id"], "object": "file", "deleted": True}
            assert (await client.get(f"/v1/files/{file['id']}")).status_code == 404
            assert services.bus.keys("pd:file*") == []

            handler.may_answer.clear()
            batch = await begin(client, some_lines(1))
            in_use = await client.delete(f"/v1/files/{batch['input_file_id']}")
            assert in_use.status_code == 409
            assert batch["id"] in in_use.text
            handler.may_answer.set()
            await becomes(client, batch, "completed")
            assert (await client.delete(f"/v1/files/{batch['input_file_id']}")).status_code == 200

    run(test())


def test_what_is_too_large_or_no_file_is_refused_and_nothing_stays(
    settings: Settings, services: Services
) -> None:
    small = settings.model_copy(update={"max_file_bytes": 3 << 20})

    async def parts(size: int) -> AsyncIterator[bytes]:  # no length that could be known before
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(size >> 16):
            yield b"x" * (1 << 16)
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--'

    async def test() -> None:
        async with an_api(small, Handler()) as client:

            async def send(content: Any, kind: str = "multipart/form-data; boundary=b") -> Any:
                headers = {"Content-Type": kind}
                return await client.post("/v1/files", content=content, headers=headers)

            assert (await send(parts(2 << 20))).status_code == 200
            (file,) = (await client.get("/v1/files")).json()["data"]
            await client.delete(f"/v1/files/{file['id']}")

            for refused in (await send(parts(5 << 20)), await send(b"x" * (5 << 20))):
                assert refused.status_code == 413
                assert "PDTASKS_MAX_FILE_BYTES" in refused.json()["error"]["message"]
            for content, kind in (
                (b"{}", "application/json"),
                (b"no form", "multipart/form-data; boundary=b"),
                (b"--b", "multipart/form-data; boundary=b"),
                (
                    b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nx",
                    "multipart/form-data; boundary=b",
                ),
            ):
                assert (await send(content, kind)).status_code == 400
            for data in (
                {},
                {"purpose": "vision"},
                {"purpose": "batch", "expires_after[seconds]": "9"},
            ):
                response = await client.post(
                    "/v1/files", data=data, files={"file": io.BytesIO(b"x")}
                )
                assert response.status_code == 400, response.text
            assert services.bus.keys("pd:file*") == []

    run(test())


def test_files_and_lines_leave_the_buss_memory_for_tokens(
    settings: Settings, services: Services
) -> None:
    handler = Handler()

    def fill(part: float) -> None:
        used = cast("dict[str, Any]", services.bus.info("memory"))["used_memory"]
        services.bus.config_set("maxmemory", int(used / part))

    before = cast("dict[str, Any]", services.bus.info("memory"))["maxmemory"]

    async def test() -> None:
        async with an_api(settings, handler) as client:
            file = await upload(client, some_lines(3))
            fill(0.6)
            refused = await client.post(
                "/v1/files", data={"purpose": "batch"}, files={"file": b"x" * 100}
            )
            assert refused.status_code == 507
            assert "delete files" in refused.json()["error"]["message"]
            order = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
            batch = (await client.post("/v1/batches", json=order)).json()
            await becomes(client, batch, "completed")

            fill(0.8)
            refused = await client.post("/v1/batches", json=order)
            assert refused.status_code == 429, refused.text
            handler.asked.clear()
            services.bus.config_set("maxmemory", before)
            handler.may_answer.clear()
            batch = await begin(client, some_lines(20))
            await until(lambda: handler.at_once == settings.batch_concurrency)
            fill(0.8)
            handler.may_answer.set()
            await until(lambda: not handler.at_once)
            counts = (await look(client, batch))["request_counts"]
            assert counts["completed"] < 20
            services.bus.config_set("maxmemory", before)
            await becomes(client, batch, "completed")

    try:
        run(test())
    finally:
        services.bus.config_set("maxmemory", before)


def test_lists_go_on_behind_what_was_seen(settings: Settings) -> None:
    async def test() -> None:
        async with an_api(settings, Handler()) as client:
            made = [await begin(client, some_lines(1)) for _ in range(5)]
            newest = [one["id"] for one in reversed(made)]
            for batch in made:
                await becomes(client, batch, "completed")

            page = (await client.get("/v1/batches", params={"limit": 2})).json()
            assert ([one["id"] for one in page["data"]], page["has_more"]) == (newest[:2], True)
            query = {"limit": 3, "after": page["last_id"]}
            page = (await client.get("/v1/batches", params=query)).json()
            assert ([one["id"] for one in page["data"]], page["has_more"]) == (newest[2:], False)

            query = {"order": "asc", "purpose": "batch", "limit": 2}
            page = (await client.get("/v1/files", params=cast("Any", query))).json()
            assert [one["id"] for one in page["data"]] == [m["input_file_id"] for m in made[:2]]
            gone = await client.get("/v1/files", params={"after": "file-" + "0" * 32})
            assert gone.status_code == 404

    run(test())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"endpoint": "/v1/embeddings"}, "nothing else is served"),
        ({"completion_window": "1h"}, "24h"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "16"),
        ({"input_file_id": "file-nobody"}, "no file"),
    ],
)
def test_orders_that_cannot_be_are_refused(
    settings: Settings, changes: dict[str, Any], complaint: str
) -> None:
    async def test() -> None:
        async with an_api(settings, Handler()) as client:
            file = await upload(client, some_lines(1))
            order = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
            response = await client.post("/v1/batches", json=order | changes)
            assert response.status_code in (400, 404)
            assert complaint in response.text

    run(test())


def test_what_nobody_of_ours_has_written_hides_nothing_else(
    settings: Settings, services: Services
) -> None:
    async def test() -> None:
        async with an_api(settings, Handler()) as client:
            odd = [f"batch_{n}" for n in ("0" * 32, "1" * 32)]
            services.bus.set(f"pd:batch:{odd[0]}", "x")
            services.bus.hset(
                f"pd:batch:{odd[1]}", mapping={"status": "in_progress", "expires_at": "1"}
            )
            services.bus.zadd("pd:batches:open", dict.fromkeys(odd, 0))
            services.bus.zadd("pd:batches", dict.fromkeys(odd, 0))
            batch = await becomes(client, await begin(client, some_lines(2)), "completed")

            for name in odd:
                assert (await client.get(f"/v1/batches/{name}")).status_code == 500
            listed = (await client.get("/v1/batches")).json()["data"]
            assert [one["id"] for one in listed] == [batch["id"]]

    run(test())
