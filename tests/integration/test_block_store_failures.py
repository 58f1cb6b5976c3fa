"""What does a block store say of a real server that fails or refuses, and how soon?"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import valkey

from pdtasks.cluster.probes import valkey_answers
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.kv.store import BlockStore, StoreError
from tests.integration.conftest import Services, StoreServer
from tests.integration.store_calls import BLOCK, MIB, MakeStore, calls, get, put
from tests.waiting import wait_until


@pytest.fixture(params=["unix socket", "tcp"])
def own_server_of_either_kind(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[ValkeyServer]:
    """A server that a test may set up as it likes."""
    kind = "kv" if request.param == "unix socket" else "bus"
    with StoreServer(tmp_path / "own", cast("Any", kind)) as server:
        yield server


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
