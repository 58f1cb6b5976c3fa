"""Where are blocks kept? In real Valkey servers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import valkey

from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.kv import store as store_module
from pdtasks.kv.store import BlockStore, StoreError
from tests.integration.conftest import Services

MakeStore = Callable[..., BlockStore]
BLOCK = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    made: list[BlockStore] = []

    def make(*urls: str, ttl_s: int = 60) -> BlockStore:
        made.append(BlockStore(urls, ttl_s=ttl_s, max_connections=4))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server that a test may stop, over TCP."""
    with ValkeyServer(tmp_path / "own", "bus") as server:
        yield server


@pytest.fixture(params=["unix socket", "tcp"])
def url(request: pytest.FixtureRequest, services: Services) -> str:
    """The kv server listens on a unix socket, the bus on TCP: the store takes either."""
    server, client = (
        (services.kv_server, services.kv)
        if request.param == "unix socket"
        else (services.bus_server, services.bus)
    )
    client.flushall()
    return server.url


def test_a_block_is_the_same_when_it_comes_back(url: str, make_store: MakeStore) -> None:
    store = make_store(url)

    store.put("pd:kv:a", memoryview(BLOCK))

    found = store.get("pd:kv:a")
    assert found is not None
    assert bytes(found) == BLOCK


def test_a_block_lives_for_its_time_from_its_last_use(url: str, make_store: MakeStore) -> None:
    store = make_store(url, ttl_s=77)
    store.put("pd:kv:a", memoryview(b"x"))
    with valkey.Valkey.from_url(url) as client:
        assert 75 <= cast("int", client.ttl("pd:kv:a")) <= 77

        client.expire("pd:kv:a", 5)
        assert store.touch("pd:kv:a")

        assert 75 <= cast("int", client.ttl("pd:kv:a")) <= 77


def test_what_is_not_there_is_none_and_no_error(url: str, make_store: MakeStore) -> None:
    store = make_store(url)
    store.put("pd:kv:a", memoryview(b"x"))

    store.delete(["pd:kv:a", "pd:kv:never"])

    assert store.get("pd:kv:a") is None
    assert not store.touch("pd:kv:a")


def test_an_evicted_block_is_none(make_store: MakeStore, tmp_path: Path) -> None:
    with ValkeyServer(tmp_path / "small", "kv", maxmemory=8 << 20) as small:
        store = make_store(small.url)

        for number in range(20):  # 20 MiB into 8
            store.put(f"pd:kv:{number}", memoryview(BLOCK))

        assert store.get("pd:kv:0") is None
        assert store.get("pd:kv:19") is not None


def test_several_threads_may_use_one_store(url: str, make_store: MakeStore) -> None:
    store = make_store(url)

    def round_trip(number: int) -> bool:
        value = number.to_bytes(4, "little") * 50_000
        store.put(f"pd:kv:{number}", memoryview(value))
        found = store.get(f"pd:kv:{number}")
        return found is not None and bytes(found) == value

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(round_trip, range(64)))


def test_blocks_are_spread_and_found_whatever_the_order_of_the_servers(
    services: Services, own_server: ValkeyServer, make_store: MakeStore
) -> None:
    services.kv.flushall()
    urls = [services.kv_server.url, own_server.url]
    store, other_way_round = make_store(*urls), make_store(*reversed(urls))

    for number in range(64):
        store.put(f"pd:kv:{number}", memoryview(b"x"))

    assert all(other_way_round.get(f"pd:kv:{n}") is not None for n in range(64))
    sizes = [cast("int", valkey.Valkey.from_url(u).dbsize()) for u in urls]
    assert sum(sizes) == 64, "each block is in one server"
    assert min(sizes) > 10


def test_another_password_moves_no_block(
    services: Services, own_server: ValkeyServer, make_store: MakeStore
) -> None:
    before = BlockStore([services.kv_server.url, own_server.url], ttl_s=1)
    after = BlockStore(
        ["unix://:new@" + services.kv_server.url.partition("@")[2], own_server.url], ttl_s=1
    )

    places = [
        [s._servers.index(s._server(f"pd:kv:{n}")) for n in range(50)] for s in (before, after)
    ]

    assert places[0] == places[1]
    before.close()
    after.close()


def test_a_server_that_is_gone_fails_at_once(
    own_server: ValkeyServer, make_store: MakeStore
) -> None:
    store = make_store(own_server.url)
    store.put("pd:kv:a", memoryview(b"x"))

    own_server.stop()
    began = time.monotonic()
    for call in (
        lambda: store.get("pd:kv:a"),
        lambda: store.touch("pd:kv:a"),
        lambda: store.put("pd:kv:a", memoryview(b"x")),
        lambda: store.delete(["pd:kv:a"]),
    ):
        with pytest.raises(StoreError):
            call()

    assert time.monotonic() - began < 4


def test_a_frozen_server_fails_within_the_deadline(
    own_server: ValkeyServer, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "ANSWER_TIMEOUT_S", 0.5)
    store = make_store(own_server.url)
    store.put("pd:kv:a", memoryview(b"x"))

    os.kill(own_server.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StoreError):
            store.get("pd:kv:a")
        assert time.monotonic() - began < 2.5
    finally:
        os.kill(own_server.process.pid, signal.SIGCONT)


def test_a_server_that_comes_back_is_used_again(
    own_server: ValkeyServer, make_store: MakeStore
) -> None:
    store = make_store(own_server.url)
    store.put("pd:kv:a", memoryview(b"x"))
    own_server.stop()
    with pytest.raises(StoreError):
        store.get("pd:kv:a")

    own_server.process.start()

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert store.get("pd:kv:a") is None, "it has lost everything, which is no error"
            break
        except StoreError:
            time.sleep(0.05)
    else:
        pytest.fail("never used again")


def test_without_servers_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="PDTASKS_KV_URLS"):
        BlockStore([], ttl_s=1)
