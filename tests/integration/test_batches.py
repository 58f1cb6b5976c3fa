"""What becomes of a batch? The API's routes and runners on a real bus, with stubs of vLLM's."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import cast

import pytest

from pdtasks.bus import batches as bus_batches
from pdtasks.bus.batches import BatchStore
from pdtasks.bus.connection import connect_async
from pdtasks.bus.files import FileStore
from pdtasks.bus.jobs import JobStore
from pdtasks.settings import Settings
from tests.integration.batch_bench import (
    CHAT,
    MODEL,
    Handler,
    a_line,
    an_api,
    becomes,
    begin,
    look,
    outcomes,
    own_settings,
    run,
    some_lines,
)
from tests.integration.conftest import Services
from tests.waiting import until


@pytest.fixture
def settings(services: Services) -> Settings:
    return own_settings(services)


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
