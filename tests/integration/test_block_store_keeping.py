"""Where are blocks kept, and do they come back the same? In real Valkey servers; also over TLS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import valkey

from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.kv.store import StoreError, UnexpectedValue
from tests.certificates import make_certificate
from tests.integration.conftest import Services
from tests.integration.store_calls import BLOCK, MIB, MakeStore, calls, get, has, put
from tests.tls_front import TlsFront


@pytest.fixture
def url(server: ValkeyServer) -> str:
    """As the workers get it, who may do less than the tests."""
    return server.url


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(MIB,), (32, MIB - 32), (0, 1, MIB - 1)], ids=str)
def test_a_block_is_the_same_when_it_comes_back(
    url: str, make_store: MakeStore, sizes: tuple[int, ...]
) -> None:
    store = make_store(url)

    put(store, "pd:kv:a", BLOCK[:32], BLOCK[32:])

    assert get(store, "pd:kv:a", *sizes) == BLOCK


def test_others_see_one_ordinary_value(server: ValkeyServer, make_store: MakeStore) -> None:
    put(make_store(server.url), "pd:kv:a", b"head", b"", b"value")

    with valkey.Valkey.from_url(server.operator_url) as client:
        assert client.get("pd:kv:a") == b"headvalue"
        client.set("pd:kv:b", b"written by somebody else")

    assert get(make_store(server.url), "pd:kv:b", 24) == b"written by somebody else"


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_values_of_any_length_are_kept(url: str, make_store: MakeStore, size: int) -> None:
    store = make_store(url)

    put(store, "pd:kv:a", bytes(size))

    assert get(store, "pd:kv:a", size) == bytes(size)


def test_a_value_of_another_length_is_unexpected_and_the_store_goes_on(
    url: str, make_store: MakeStore
) -> None:
    store = make_store(url)
    put(store, "pd:kv:a", BLOCK)

    for size in (1, 32, MIB - 1, MIB + 1):
        with pytest.raises(UnexpectedValue, match=f"{MIB} bytes"):
            get(store, "pd:kv:a", size)

    assert get(store, "pd:kv:a", MIB) == BLOCK


def test_a_block_lives_for_its_time_from_its_last_use(
    server: ValkeyServer, make_store: MakeStore
) -> None:
    store = make_store(server.url, ttl_s=77)
    put(store, "pd:kv:a", b"x")
    with valkey.Valkey.from_url(server.operator_url) as client:
        assert 75 <= cast("int", client.ttl("pd:kv:a")) <= 77

        client.expire("pd:kv:a", 5)
        assert has(store, "pd:kv:a")

        assert 75 <= cast("int", client.ttl("pd:kv:a")) <= 77


def test_what_is_not_there_is_no_error(url: str, make_store: MakeStore) -> None:
    store = make_store(url)
    put(store, "pd:kv:a", b"x")

    store.delete(["pd:kv:a", "pd:kv:never"])

    assert get(store, "pd:kv:a", 1) is None
    assert not has(store, "pd:kv:a")


def test_several_names_are_answered_in_their_order(url: str, make_store: MakeStore) -> None:
    store = make_store(url)
    for name in "bd":
        put(store, f"pd:kv:{name}", b"x")

    assert store.touch([f"pd:kv:{name}" for name in "abcdb"]) == [False, True, False, True, True]
    assert store.touch([]) == []
    store.delete([])


def test_an_evicted_block_is_a_miss(make_store: MakeStore, tmp_path: Path) -> None:
    with ValkeyServer(tmp_path / "small", "kv", maxmemory=8 << 20) as small:
        store = make_store(small.url)

        for number in range(20):  # 20 MiB into 8
            put(store, f"pd:kv:{number}", BLOCK)

        assert get(store, "pd:kv:0", MIB) is None
        assert get(store, "pd:kv:19", MIB) == BLOCK


def test_several_threads_may_use_one_store(url: str, make_store: MakeStore) -> None:
    store = make_store(url)

    def round_trip(number: int) -> bool:
        value = number.to_bytes(4, "little") * 50_000
        put(store, f"pd:kv:{number}", value)
        return get(store, f"pd:kv:{number}", len(value)) == value

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(round_trip, range(64)))
    assert len(store._connections) <= 8


def test_one_thread_keeps_one_connection(url: str, make_store: MakeStore) -> None:
    store = make_store(url)

    for number in range(20):
        put(store, f"pd:kv:{number}", b"x")
        get(store, f"pd:kv:{number}", 1)

    assert len(store._connections) == 1


# -- several servers ---------------------------------------------------------------------------


def test_blocks_are_spread_and_found_whatever_the_order_of_the_servers(
    services: Services, own_server: ValkeyServer, make_store: MakeStore
) -> None:
    services.kv.flushall()
    urls = [services.kv_server.url, own_server.url]
    store, other_way_round = make_store(*urls), make_store(*reversed(urls))
    names = [f"pd:kv:{number}" for number in range(64)]

    for name in names:
        put(store, name, name.encode())

    assert all(get(other_way_round, name, len(name)) == name.encode() for name in names)
    assert other_way_round.touch(names) == [True] * 64
    operator_urls = [services.kv_server.operator_url, own_server.operator_url]
    sizes = [cast("int", valkey.Valkey.from_url(u).dbsize()) for u in operator_urls]
    assert sum(sizes) == 64, "each block is in one server"
    assert min(sizes) > 10

    other_way_round.delete(names)
    assert store.touch(names) == [False] * 64


def test_another_password_moves_no_block(
    services: Services, own_server: ValkeyServer, make_store: MakeStore
) -> None:
    before = make_store(services.kv_server.url, own_server.url)
    after = make_store(
        "unix://pdtasks:new@" + services.kv_server.url.partition("@")[2], own_server.url
    )

    places = []
    for store in (before, after):
        servers: Any = store._servers
        places.append([servers._servers.index(servers.of(f"pd:kv:{n}", 0.0)) for n in range(50)])

    assert places[0] == places[1]


def test_a_lost_server_takes_only_its_own_blocks(
    services: Services, own_server: ValkeyServer, make_store: MakeStore
) -> None:
    services.kv.flushall()
    store = make_store(services.kv_server.url, own_server.url)
    names = [f"pd:kv:{number}" for number in range(20)]
    for name in names:
        put(store, name, b"x")
    kept = {key.decode() for key in cast("list[bytes]", services.kv.keys())}

    own_server.stop()

    for name in names:
        if name in kept:
            assert get(store, name, 1) == b"x"
        else:
            with pytest.raises(StoreError):
                get(store, name, 1)
    assert 0 < len(kept) < 20
    with pytest.raises(StoreError):
        store.delete(names)
    assert services.kv.dbsize() == 0


# -- TLS ---------------------------------------------------------------------------------------


@pytest.fixture
def tls_url(own_server: ValkeyServer, tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """The URL of a server that is reached over TLS, for who trusts a certificate."""
    certificate = make_certificate(tmp_path)
    login, _, place = own_server.url.removeprefix("valkey://").partition("@")
    behind = ("127.0.0.1", int(place.partition(":")[2].partition("/")[0]))
    with TlsFront(certificate, behind) as front:
        yield lambda trusted: f"valkeys://{login}@localhost:{front.port}/0?ssl_ca_certs={trusted}"


def test_blocks_cross_tls(
    tls_url: Callable[[Path], str], own_server: ValkeyServer, make_store: MakeStore, tmp_path: Path
) -> None:
    store = make_store(tls_url(tmp_path / "localhost.pem"))
    value = os.urandom(3 * MIB)

    for number in range(3):
        put(store, f"pd:kv:{number}", value[:32], value[32:])
    with valkey.Valkey.from_url(own_server.operator_url) as client:
        assert client.get("pd:kv:0") == value

    for number in range(3):
        assert get(store, f"pd:kv:{number}", 32, len(value) - 32) == value
    assert get(store, "pd:kv:never", 32, len(value) - 32) is None
    assert store.touch(["pd:kv:0", "pd:kv:never"]) == [True, False]
    store.delete(["pd:kv:0"])
    assert not has(store, "pd:kv:0")
    with pytest.raises(UnexpectedValue):
        get(store, "pd:kv:1", 7)
    assert get(store, "pd:kv:1", len(value)) == value


def test_threads_cross_tls_side_by_side(
    tls_url: Callable[[Path], str], make_store: MakeStore, tmp_path: Path
) -> None:
    store = make_store(tls_url(tmp_path / "localhost.pem"))

    def round_trip(number: int) -> bool:
        value = number.to_bytes(4, "little") * 100_000
        put(store, f"pd:kv:{number}", value)
        return get(store, f"pd:kv:{number}", len(value)) == value

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(round_trip, range(12)))


def test_a_server_whose_certificate_nobody_trusts_is_refused(
    tls_url: Callable[[Path], str], make_store: MakeStore, tmp_path: Path
) -> None:
    stranger = make_certificate(tmp_path, "stranger")
    store = make_store(tls_url(stranger.file))

    for call in calls(store):
        with pytest.raises(StoreError):
            call()


def test_a_server_without_tls_is_an_error_where_tls_is_asked_for(
    own_server: ValkeyServer, make_store: MakeStore
) -> None:
    store = make_store("valkeys://" + own_server.url.removeprefix("valkey://"), timeout_s=0.5)

    for call in calls(store):
        with pytest.raises(StoreError):
            call()
