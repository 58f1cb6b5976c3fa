"""Files, lists and orders of batches: whose they are, how large they may be, what is no order."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from pdtasks.settings import Settings
from tests.integration.batch_bench import (
    CHAT,
    Handler,
    an_api,
    becomes,
    begin,
    look,
    own_settings,
    run,
    some_lines,
    upload,
)
from tests.integration.conftest import Services
from tests.waiting import until


@pytest.fixture
def settings(services: Services) -> Settings:
    return own_settings(services)


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
