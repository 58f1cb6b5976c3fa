"""Where are blocks kept? In real Valkey servers."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import pytest
import valkey
from valkey.crc import key_slot

from pdtasks.cluster.probes import free_ports, valkey_answers
from pdtasks.cluster.process import Process
from pdtasks.cluster.valkey import ValkeyServer, server_program
from pdtasks.kv.store import BlockStore, StoreError, UnexpectedValue
from tests.certificates import Certificate, make_certificate
from tests.integration.conftest import Services
from tests.waiting import wait_until

MakeStore = Callable[..., BlockStore]
MIB = 1 << 20
BLOCK = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    made: list[BlockStore] = []

    def make(*urls: str, ttl_s: int = 60, timeout_s: float = 10.0) -> BlockStore:
        made.append(BlockStore(urls, ttl_s=ttl_s, timeout_s=timeout_s))
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
def own_server_of_either_kind(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[ValkeyServer]:
    """A server that a test may set up as it likes."""
    kind = "kv" if request.param == "unix socket" else "bus"
    with ValkeyServer(tmp_path / "own", cast("Any", kind)) as server:
        yield server


@pytest.fixture(params=["unix socket", "tcp"])
def server(request: pytest.FixtureRequest, services: Services) -> ValkeyServer:
    """The kv server listens on a unix socket, the bus on TCP: the store takes either."""
    server = services.kv_server if request.param == "unix socket" else services.bus_server
    with valkey.Valkey.from_url(server.operator_url) as client:
        client.flushall()
    return server


@pytest.fixture
def url(server: ValkeyServer) -> str:
    """As the workers get it, who may do less than the tests."""
    return server.url


def put(store: BlockStore, key: str, *values: bytes) -> None:
    store.put(key, [memoryview(value) for value in values])


def get(store: BlockStore, key: str, *sizes: int) -> bytes | None:
    """The value, whose length is the sum of `sizes`."""
    parts = [memoryview(bytearray(size)) for size in sizes]
    return b"".join(parts) if store.get(key, parts) else None


def has(store: BlockStore, key: str) -> bool:
    return store.touch([key]) == [True]


def calls(store: BlockStore) -> list[Callable[[], object]]:
    """One of each."""
    return [
        lambda: get(store, "pd:kv:a", 1),
        lambda: store.touch(["pd:kv:a"]),
        lambda: put(store, "pd:kv:a", b"x"),
        lambda: store.delete(["pd:kv:a"]),
    ]


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


# -- servers that fail -------------------------------------------------------------------------


def test_a_server_that_is_gone_fails_at_once(
    own_server: ValkeyServer, make_store: MakeStore
) -> None:
    store = make_store(own_server.url)
    put(store, "pd:kv:a", b"x")

    own_server.stop()
    began = time.monotonic()
    for call in calls(store):
        with pytest.raises(StoreError):
            call()

    assert time.monotonic() - began < 4


def test_a_frozen_server_fails_within_the_deadline(
    own_server_of_either_kind: ValkeyServer, make_store: MakeStore
) -> None:
    server = own_server_of_either_kind
    store = make_store(server.url, timeout_s=0.5)
    put(store, "pd:kv:a", b"x")

    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        large: Callable[[], object] = lambda: put(store, "pd:kv:b", bytes(16 * MIB))  # noqa: E731
        for call in [*calls(store), large]:
            began = time.monotonic()
            with pytest.raises(StoreError):
                call()
            assert time.monotonic() - began < 2.5
    finally:
        os.kill(server.process.pid, signal.SIGCONT)

    put(store, "pd:kv:a", b"y")
    assert get(store, "pd:kv:a", 1) == b"y", "an answer that came late is nobody's"


def test_a_call_may_have_a_deadline_of_its_own(
    own_server: ValkeyServer, make_store: MakeStore
) -> None:
    store = make_store(own_server.url)
    put(store, "pd:kv:a", b"x")

    os.kill(own_server.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StoreError):
            store.get("pd:kv:a", [memoryview(bytearray(1))], began + 0.2)
        with pytest.raises(StoreError):
            store.put("pd:kv:a", [memoryview(b"x")], began + 0.2)
        assert time.monotonic() - began < 5
    finally:
        os.kill(own_server.process.pid, signal.SIGCONT)


def restart(server: ValkeyServer) -> None:
    """The same server again, empty."""
    server.process.start()
    wait_until(lambda: valkey_answers(server.url), what="the server answers again")


@pytest.mark.parametrize("call", range(4), ids=["get", "touch", "put", "delete"])
def test_a_kept_connection_to_a_server_that_was_restarted_is_replaced_silently(
    own_server: ValkeyServer, make_store: MakeStore, call: int
) -> None:
    store = make_store(own_server.url)
    for each in calls(store):  # so that there are connections
        each()

    own_server.stop()
    restart(own_server)
    calls(store)[call]()

    put(store, "pd:kv:b", BLOCK)
    assert get(store, "pd:kv:b", MIB) == BLOCK
    assert len(store._connections) == 1, "the old one is forgotten"


@pytest.mark.parametrize("direction", ["put", "get"])
@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
def test_a_server_killed_in_mid_transfer_is_an_error_and_used_again_when_it_is_back(
    own_server: ValkeyServer, make_store: MakeStore, direction: str, kept: bool
) -> None:
    # Given a server that has taken a part of a value, or a question, and stands still
    store = make_store(own_server.url)
    value = bytes(64 * MIB)
    with ThreadPoolExecutor(1) as thread:
        if kept:
            thread.submit(put, store, "pd:kv:a", b"x").result()
        else:
            wait_until(lambda: valkey_answers(own_server.url))
        os.kill(own_server.process.pid, signal.SIGSTOP)
        transfer: Future[Any] = (
            thread.submit(put, store, "pd:kv:a", value)
            if direction == "put"
            else thread.submit(get, store, "pd:kv:a", len(value))
        )
        if kept:
            port = int(own_server.url.rpartition(":")[2].partition("/")[0])
            wait_until(lambda: waiting_bytes(port), what="a part has been sent")

        # When it dies
        os.kill(own_server.process.pid, signal.SIGKILL)

        # Then
        with pytest.raises(StoreError):
            transfer.result(timeout=10)
        own_server.stop()
        restart(own_server)
        thread.submit(put, store, "pd:kv:a", BLOCK).result()
        assert thread.submit(get, store, "pd:kv:a", MIB).result() == BLOCK


def waiting_bytes(port: int) -> int:
    """Bytes that have arrived at a TCP port of this host and were not read yet."""
    total = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if int(local.rpartition(":")[2], 16) == port and state == "01":
            total += int(queues.rpartition(":")[2], 16)
    return total


def test_a_server_that_comes_back_is_used_again(
    own_server: ValkeyServer, make_store: MakeStore
) -> None:
    store = make_store(own_server.url)
    put(store, "pd:kv:a", b"x")
    own_server.stop()
    with pytest.raises(StoreError):
        get(store, "pd:kv:a", 1)

    restart(own_server)

    assert get(store, "pd:kv:a", 1) is None, "it has lost everything, which is no error"


def test_a_server_that_closes_idle_connections_is_no_error(
    own_server_of_either_kind: ValkeyServer, make_store: MakeStore
) -> None:
    server = own_server_of_either_kind
    store = make_store(server.url)
    put(store, "pd:kv:a", b"x")
    with valkey.Valkey.from_url(server.operator_url) as client:
        for _ in range(3):
            client.client_kill_filter(_type="normal", skipme=True)
            assert get(store, "pd:kv:a", 1) == b"x"


# -- servers that refuse -----------------------------------------------------------------------


def test_a_value_that_is_too_large_for_the_server_is_an_error(
    own_server_of_either_kind: ValkeyServer, make_store: MakeStore
) -> None:
    server = own_server_of_either_kind
    store = make_store(server.url)
    with valkey.Valkey.from_url(server.operator_url) as client:
        client.config_set("proto-max-bulk-len", "1mb")

    for _ in range(2):  # with a new connection and, if there is one, the kept one
        with pytest.raises(StoreError):
            put(store, "pd:kv:a", bytes(MIB + 1))
        with pytest.raises(StoreError):
            put(store, "pd:kv:a", bytes(32 * MIB))
        assert get(store, "pd:kv:a", MIB + 1) is None, "nothing is stored"

    put(store, "pd:kv:b", BLOCK)
    assert get(store, "pd:kv:b", MIB) == BLOCK


def test_a_full_server_that_does_not_evict_is_an_error(
    own_server_of_either_kind: ValkeyServer, make_store: MakeStore
) -> None:
    server = own_server_of_either_kind
    store = make_store(server.url)
    with valkey.Valkey.from_url(server.operator_url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "8mb")

    stored: list[str] = []

    def fill() -> None:
        while len(stored) < 20:
            put(store, f"pd:kv:{len(stored)}", BLOCK)
            stored.append(f"pd:kv:{len(stored)}")

    with pytest.raises(StoreError, match=r"^OOM$"):
        fill()

    # Nothing is stored under the name, everything else is there, and room makes it work again.
    refused = f"pd:kv:{len(stored)}"
    assert get(store, refused, MIB) is None
    assert stored
    assert store.touch(stored) == [True] * len(stored)
    store.delete(stored)
    put(store, refused, BLOCK)
    assert get(store, refused, MIB) == BLOCK
    assert len(store._connections) == 1, "a refusal costs no connection"


def test_a_wrong_password_is_an_error_that_does_not_quote_it(
    own_server_of_either_kind: ValkeyServer, make_store: MakeStore
) -> None:
    scheme, _, rest = own_server_of_either_kind.url.partition("://")
    user = rest.partition(":")[0]
    store = make_store(f"{scheme}://{user}:wrong-canary@{rest.partition('@')[2]}")

    for call in calls(store):
        with pytest.raises(StoreError) as error:
            call()
        assert "canary" not in str(error.value)


def test_what_the_user_may_not_do_is_an_error_and_nothing_worse(
    services: Services, make_store: MakeStore
) -> None:
    # The kv server's user may use the KV plane's names alone.
    store = make_store(services.kv_server.url)
    put(store, "pd:kv:a", b"x")

    with pytest.raises(StoreError, match=r"^NOPERM$"):
        put(store, "celery-canary", b"x")
    with pytest.raises(StoreError, match=r"^NOPERM$"):
        get(store, "celery-canary", 1)

    assert get(store, "pd:kv:a", 1) == b"x"
    assert len(store._connections) == 1


def test_something_else_under_the_name_is_an_error(
    server: ValkeyServer, make_store: MakeStore
) -> None:
    store = make_store(server.url)
    with valkey.Valkey.from_url(server.operator_url) as client:
        client.rpush("pd:kv:a", "a list")

    with pytest.raises(StoreError, match="WRONGTYPE"):
        get(store, "pd:kv:a", 6)

    put(store, "pd:kv:a", b"a value")
    assert get(store, "pd:kv:a", 7) == b"a value"


def test_urls_that_make_no_sense_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="PDTASKS_KV_URLS"):
        BlockStore([], ttl_s=1)
    with pytest.raises(ValueError, match="one node"):
        BlockStore(["cluster+valkey://a", "valkey://b"], ttl_s=1)
    with pytest.raises(ValueError, match="URL"):
        BlockStore(["http://a"], ttl_s=1)


# -- TLS ---------------------------------------------------------------------------------------


class TlsFront:
    """Speaks TLS before a server that cannot: the embedded Valkey is built without."""

    def __init__(self, certificate: Certificate, port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate.file, certificate.key)
        self._behind = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                sock, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(5)
            with (
                self._context.wrap_socket(sock, server_side=True) as outside,
                socket.create_connection(("127.0.0.1", self._behind)) as inside,
            ):
                self._relay(outside, inside)

    def _relay(self, outside: ssl.SSLSocket, inside: socket.socket) -> None:
        while not self._closed.is_set():
            ready: list[socket.socket] = [outside] if outside.pending() else []
            ready = ready or select.select([outside, inside], [], [], 0.05)[0]
            for source in ready:
                data = source.recv(1 << 16)
                if not data:
                    return
                (inside if source is outside else outside).sendall(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()


@pytest.fixture
def tls_url(own_server: ValkeyServer, tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """The URL of a server that is reached over TLS, for who trusts a certificate."""
    certificate = make_certificate(tmp_path)
    login, _, place = own_server.url.removeprefix("valkey://").partition("@")
    with TlsFront(certificate, int(place.partition(":")[2].partition("/")[0])) as front:
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


# -- Valkey Cluster ----------------------------------------------------------------------------

NUM_SLOTS = 16384
PASSWORD = "cluster-password"


@dataclass
class Node:
    """A node of a cluster."""

    process: Process
    port: int
    bus_port: int

    @property
    def url(self) -> str:
        return f"valkey://:{PASSWORD}@127.0.0.1:{self.port}"

    def ask(self, *command: object) -> Any:
        with valkey.Valkey.from_url(self.url) as client:
            return client.execute_command(*command)

    @property
    def name(self) -> str:
        return str(self.ask("CLUSTER MYID").decode())

    def sees(self, num_nodes: int) -> bool:
        """Does it know that many nodes, and that all is well?"""
        if not valkey_answers(self.url):
            return False
        info = self.ask("CLUSTER INFO")
        return bool(
            info["cluster_state"] == "ok"
            and info["cluster_known_nodes"] == str(num_nodes)
            and info["cluster_slots_ok"] == str(NUM_SLOTS)
        )


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Three nodes, each with a third of the slots."""
    started = []
    try:
        for number in range(3):
            folder = tmp_path_factory.mktemp(f"node{number}")
            port, bus_port = free_ports(2)
            options = {
                "bind": "127.0.0.1",
                "port": port,
                "dir": folder,
                "save": '""',
                "requirepass": PASSWORD,
                "cluster-enabled": "yes",
                "cluster-port": bus_port,
                "cluster-node-timeout": 2000,
                "cluster-require-full-coverage": "no",
            }
            process = Process(
                f"node {number}",
                [str(server_program()), "-"],
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                log=folder / "log",
                stdin="".join(f"{name} {value}\n" for name, value in options.items()),
                cwd=folder,
            )
            process.start()
            started.append(Node(process, port, bus_port))
        bounds = [NUM_SLOTS * i // 3 for i in range(4)]
        for number, node in enumerate(started):
            wait_until(partial(valkey_answers, node.url))
            node.ask("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            node.ask("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in started[1:]:
            started[0].ask("CLUSTER MEET", "127.0.0.1", node.port, node.bus_port)
        wait_until(lambda: all(n.sees(3) for n in started), 30, "the cluster agrees")
        yield started
    finally:
        for node in started:
            node.process.kill()


@pytest.fixture
def cluster(nodes: list[Node]) -> list[Node]:
    """The nodes, empty."""
    for node in nodes:
        node.ask("FLUSHALL")
    return nodes


def owner_of(nodes: list[Node], key: str) -> Node:
    """The node that has `key`, as the first of `nodes` sees it."""
    slot = key_slot(key.encode())
    for first, last, primary, *_ in nodes[0].ask("CLUSTER SLOTS"):
        if first <= slot <= last:
            return next(node for node in nodes if node.port == primary[1])
    raise AssertionError(f"nobody has slot {slot}")


def all_say(nodes: list[Node], key: str, owner: Node) -> bool:
    """Do the nodes agree on who has `key`?"""
    return all(owner_of([node, *nodes], key) is owner for node in nodes)


def name_on(nodes: list[Node], owner: Node) -> str:
    """A name that lives there."""
    names = (f"pd:kv:{number}" for number in itertools.count())
    return next(name for name in names if owner_of(nodes, name) is owner)


def test_blocks_are_spread_over_a_cluster_and_found(
    cluster: list[Node], make_store: MakeStore
) -> None:
    store = make_store(f"cluster+{cluster[0].url}")
    names = [f"pd:kv:{number}" for number in range(50)]

    for name in names:
        put(store, name, name.encode(), BLOCK)

    # Whichever node is named
    other = make_store(f"cluster+{cluster[2].url}")
    for name in names:
        assert get(other, name, len(name) + MIB) == name.encode() + BLOCK
    assert other.touch([*names, "pd:kv:never"]) == [True] * 50 + [False]
    sizes = [node.ask("DBSIZE") for node in cluster]
    assert sum(sizes) == 50
    assert min(sizes) >= 5
    other.delete(names)
    assert [node.ask("DBSIZE") for node in cluster] == [0, 0, 0]


def test_a_cluster_whose_node_stands_still_costs_no_more_than_the_deadline(
    cluster: list[Node], make_store: MakeStore
) -> None:
    # Given a store that has to ask for the layout, of a node that answers nothing
    store = make_store(f"cluster+{cluster[0].url}", timeout_s=10)
    os.kill(cluster[0].process.pid, signal.SIGSTOP)
    try:

        def ask(number: int) -> float:
            began = time.monotonic()
            with pytest.raises(StoreError):
                store.get(f"pd:kv:{number}", [memoryview(bytearray(3))], time.monotonic() + 0.5)
            return time.monotonic() - began

        # Then several threads wait side by side, each within its deadline
        with ThreadPoolExecutor(4) as threads:
            assert max(threads.map(ask, range(8))) < 1.5
    finally:
        os.kill(cluster[0].process.pid, signal.SIGCONT)


def test_a_node_that_stands_still_does_not_hold_up_the_blocks_of_others(
    cluster: list[Node], make_store: MakeStore
) -> None:
    # Given a store that knows the layout, and would ask the node that stands still first
    frozen, other, _ = cluster
    gone, kept = name_on(cluster, frozen), name_on(cluster, other)
    store = make_store(f"cluster+{frozen.url}", timeout_s=10)
    servers = cast("Any", store._servers)
    for name in (gone, kept):
        put(store, name, b"x")
    os.kill(frozen.process.pid, signal.SIGSTOP)
    try:

        def is_lost() -> bool:
            with pytest.raises(StoreError):
                store.get(gone, [memoryview(bytearray(1))], time.monotonic() + 0.2)
            return bool(servers._outdated)

        wait_until(is_lost)

        # When it looks for whoever has taken that node's place
        began = time.monotonic()
        for _ in range(20):
            deadline = time.monotonic() + 3
            assert store.get(kept, [memoryview(bytearray(1))], deadline)

        # Then those of the others are had meanwhile
        assert time.monotonic() - began < 3
        assert servers._outdated
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
        wait_until(lambda: all(node.sees(3) for node in cluster), 30, "the node is back")


def test_connections_to_a_node_that_was_replaced_are_closed(
    cluster: list[Node], make_store: MakeStore
) -> None:
    store = make_store(f"cluster+{cluster[0].url}")
    for number in range(20):
        put(store, f"pd:kv:{number}", b"abc")
    before = set(store._connections)

    # When the layout is asked for anew, and names other clients for the same nodes
    servers = cast("Any", store._servers)
    for node in servers._cluster.get_nodes():
        node.valkey_connection = None
    servers._cluster.nodes_manager.nodes_cache = {}
    servers._outdated = True
    for number in range(20):
        assert get(store, f"pd:kv:{number}", 3) == b"abc"

    assert not before & store._connections
    assert len(store._connections) <= len(cluster)


def test_threads_use_a_cluster_side_by_side(cluster: list[Node], make_store: MakeStore) -> None:
    store = make_store(f"cluster+{cluster[0].url}")

    def round_trip(number: int) -> bool:
        value = number.to_bytes(4, "little") * 50_000
        put(store, f"pd:kv:{number}", value)
        return get(store, f"pd:kv:{number}", len(value)) == value

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(round_trip, range(40)))
    assert len(store._connections) <= 4 * 3


def test_a_slot_that_moves_costs_its_blocks_and_never_gives_a_wrong_one(
    cluster: list[Node], make_store: MakeStore
) -> None:
    # Given stores that know where a block is
    key, neighbour = "pd:kv:{moves}:1", "pd:kv:{moves}:2"
    store, reader, prober = (make_store(f"cluster+{cluster[0].url}") for _ in range(3))
    put(store, key, BLOCK)
    assert get(reader, key, MIB) == BLOCK
    assert has(prober, key)
    slot, old = key_slot(key.encode()), owner_of(cluster, key)
    new = next(node for node in cluster if node is not old)

    # While its slot is about to move, what is there stays and what is not there is refused
    new.ask("CLUSTER SETSLOT", slot, "IMPORTING", old.name)
    old.ask("CLUSTER SETSLOT", slot, "MIGRATING", new.name)
    assert get(store, key, MIB) == BLOCK
    with pytest.raises(StoreError, match="ASK"):
        put(store, neighbour, BLOCK)

    # When it has moved
    old.ask("DEL", key)
    for node in (new, old):
        node.ask("CLUSTER SETSLOT", slot, "NODE", new.name)
    wait_until(lambda: all_say(cluster, key, new))
    new.ask("SET", neighbour, b"new")

    # Then whoever asks the old node hears of it, once
    first_calls: list[Callable[[], object]] = [
        lambda: get(store, neighbour, 3),
        lambda: get(reader, neighbour, 3),
        lambda: has(prober, neighbour),
    ]
    for call in first_calls:
        with contextlib.suppress(StoreError):
            assert call() in (b"new", True)
    assert get(store, neighbour, 3) == get(reader, neighbour, 3) == b"new"
    assert has(prober, neighbour)
    assert get(store, key, MIB) is None
    put(store, key, BLOCK)
    assert get(reader, key, MIB) == BLOCK
    reader.delete([key, neighbour])
    assert new.ask("DBSIZE") == 0


def test_a_lost_node_takes_its_own_blocks_alone_until_another_has_its_place(
    cluster: list[Node], make_store: MakeStore
) -> None:
    # Given a store that was told of the node that will be lost, and of no other
    lost, other, third = cluster
    gone, kept = name_on(cluster, lost), name_on(cluster, other)
    store = make_store(f"cluster+{lost.url}", timeout_s=1.0)
    for name in (gone, kept):
        put(store, name, b"x")

    lost.process.kill()
    try:
        for _ in range(2):
            with pytest.raises(StoreError):
                get(store, gone, 1)
            with pytest.raises(StoreError):
                has(store, gone)
            assert get(store, kept, 1) == b"x"
            assert has(store, kept)

        # When another takes its place, of which no node that is left tells
        for node in (other, third):
            node.ask("CLUSTER SETSLOT", key_slot(gone.encode()), "NODE", other.name)
        other.ask("CLUSTER BUMPEPOCH")  # its word counts more than that of the lost one

        # Then the store finds that out
        def works() -> bool:
            with contextlib.suppress(StoreError):
                return get(store, gone, 1) is None
            return False

        wait_until(works)
        put(store, gone, b"y")
        assert other.ask("GET", gone) == b"y"
    finally:
        lost.process.start()
        wait_until(lambda: all(node.sees(3) for node in cluster), 30, "the node is back")
    wait_until(lambda: all_say(cluster, gone, other))

    # and the node that is back is as good as the others
    back = name_on(cluster, lost)
    put(store, back, b"z")
    assert get(store, back, 1) == b"z"
    assert get(store, gone, 1) == b"y"


def test_no_cluster_at_all_is_an_error(own_server: ValkeyServer, make_store: MakeStore) -> None:
    (port,) = free_ports(1)
    for url in (own_server.url, f"valkey://127.0.0.1:{port}", "unix:///nowhere"):
        for call in calls(make_store(f"cluster+{url}", timeout_s=1.0)):
            with pytest.raises(StoreError):
                call()
