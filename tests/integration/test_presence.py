"""Who is there?"""

from __future__ import annotations

import asyncio
import signal
import time

import msgspec
import valkey

from pdtasks.bus.connection import connect_async
from pdtasks.bus.keys import WORKERS
from pdtasks.bus.presence import (
    leave_status,
    read_workers,
    read_workers_async,
    remove_status,
    worker_key,
)
from pdtasks.messages import WIRE_VERSION, WorkerStatus
from pdtasks.settings import Settings
from tests.integration.conftest import Services, StartWorker
from tests.waiting import wait_until


def a_status(name: str, role: str = "decode", **fields: int) -> WorkerStatus:
    status = WorkerStatus(name=name, role=role, host="h", pid=1, state="ready")
    return msgspec.structs.replace(status, **fields)


def leave(bus: valkey.Valkey, name: str | bytes, wire: bytes | None) -> None:
    """Somebody is seen under that name; None: with something else."""
    member = name.encode() if isinstance(name, str) else name
    if wire is not None:
        bus.set(worker_key("").encode() + member, wire)
    bus.zadd(WORKERS, {member: time.time()})


def test_workers_are_found_by_role_and_name(services: Services) -> None:
    bus = services.bus
    bus.flushall()
    for status in (a_status("b"), a_status("a"), a_status("c", "prefill")):
        leave(bus, status.name, status.to_wire())

    async def read_async() -> list[WorkerStatus]:
        client = connect_async(Settings(bus_url=services.bus_server.url))
        try:
            return await read_workers_async(client)
        finally:
            await client.aclose()

    assert [w.name for w in read_workers(bus)] == ["a", "b", "c"]
    assert asyncio.run(read_async()) == read_workers(bus)


def test_other_releases_and_other_keys_do_not_count(services: Services) -> None:
    bus = services.bus
    bus.flushall()
    leave(bus, "a", a_status("a").to_wire())
    leave(bus, "old", a_status("old", version=WIRE_VERSION + 1).to_wire())
    leave(bus, "junk", b"\xc1")
    bus.set("pd:reply:x", "not a worker")

    assert [w.name for w in read_workers(bus)] == ["a"]


def test_whatever_lies_under_a_workers_name_the_others_are_seen(services: Services) -> None:
    bus = services.bus
    bus.flushall()
    status = a_status("a")
    leave(bus, "a", status.to_wire())
    for number, odd in enumerate(
        (
            b"",
            b"\xff" * 100,
            b"\x91" * 100_000,
            status.to_wire()[:-4],
            status.to_wire() + b"\x00",
            status.to_wire().replace(b"decode", b"\xff\xfe\xfd\xfc\xfb\xfa"),
            msgspec.structs.replace(status, name="two\nlines").to_wire(),
            msgspec.structs.replace(status, slots=-1).to_wire(),
            msgspec.structs.replace(status, kv_usage=float("nan")).to_wire(),
            msgspec.structs.replace(status, role="king").to_wire(),
        )
    ):
        leave(bus, f"odd{number}", odd)
    bus.rpush(worker_key("list"), "x")
    bus.hset(worker_key("hash"), "x", "y")
    for name in ("list", "hash", "nobody"):
        leave(bus, name, None)
    leave(bus, b"\xff\xfe", b"no name")

    assert read_workers(bus) == [status]


def test_names_that_nobody_uses_are_forgotten(services: Services) -> None:
    bus = services.bus
    bus.flushall()
    bus.zadd(WORKERS, {"yesterday": time.time() - 100_000, "just now": time.time() - 100})

    assert leave_status(bus, a_status("a"), 10_000, lambda _: False) is None
    assert bus.zrange(WORKERS, 0, -1) == [b"just now", b"a"]
    assert [w.name for w in read_workers(bus)] == ["a"]
    remove_status(bus, a_status("a"))
    assert bus.zrange(WORKERS, 0, -1) == [b"just now"]


def test_an_empty_bus_has_no_workers(services: Services) -> None:
    services.bus.flushall()

    assert read_workers(services.bus) == []


def test_a_worker_says_what_it_is(start_worker: StartWorker, services: Services) -> None:
    worker = start_worker("decode")

    (status,) = read_workers(services.bus)

    assert (status.name, status.role, status.pid) == ("decode1@test", "decode", worker.pid)
    assert (status.state, status.active, status.max_model_len) == ("ready", 0, 1000)
    assert status.engine.startswith("vllm ")


def test_a_killed_worker_disappears_within_its_time(
    start_worker: StartWorker, services: Services
) -> None:
    worker = start_worker("decode")

    worker.signal(signal.SIGKILL)

    wait_until(lambda: read_workers(services.bus) == [], 5, "its key expires after 3 s")


def test_a_worker_outlives_a_bus_that_forgets_it(
    start_worker: StartWorker, services: Services
) -> None:
    start_worker("decode")

    services.bus.flushall()

    wait_until(lambda: read_workers(services.bus), 5, "it says again that it is there")
