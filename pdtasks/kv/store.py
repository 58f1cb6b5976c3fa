"""Where are blocks kept?  In one or more Valkey servers, chosen by the block's name.

Several servers are independent of each other; a name always maps to the same one (rendezvous
hashing, Thaler and Ravishankar 1998), and a server that is added or removed moves only its own
share of the names.  A URL that begins with `cluster+` names a Valkey Cluster instead, which says
itself where a name lives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import valkey
import xxhash
from valkey.cluster import ValkeyCluster
from valkey.exceptions import AskError, ClusterDownError, ValkeyClusterException

from pdtasks.kv.wire import BlockConnection, StoreError, UnexpectedValue
from pdtasks.tls import valkey_url

__all__ = ["BlockStore", "StoreError", "UnexpectedValue"]

#: Seconds to wait for a connection. A store that is away costs a recompute.
CONNECT_TIMEOUT_S = 2.0
#: Seconds that one transfer may take, unless its caller says otherwise.
TIMEOUT_S = 10.0
_CLUSTER = "cluster+"
#: Errors that say: a name lives elsewhere now.
_MOVED = ("MOVED", "ASK", "CLUSTERDOWN")
#: Seconds between two looks for whoever has taken a lost node's place.
_LAYOUT_S = 2.0
#: Seconds that such a look may hold up blocks whose place is known, or was until now.
_PATIENCE_S = 0.5

T = TypeVar("T")


class BlockStore:
    """Puts, gets and deletes values by name.

    Safe to use from several threads; each has connections of its own, so the number of threads
    bounds the number of connections.
    """

    def __init__(self, urls: Sequence[str], *, ttl_s: int, timeout_s: float = TIMEOUT_S) -> None:
        """Args:
        urls: `valkey://`, `valkeys://` or `unix://` URLs of the kv servers, or one URL of a
            cluster's node with `cluster+` before it.
        ttl_s: seconds after which an unused block disappears, in case nobody deletes it.
        timeout_s: longest time for one call without a deadline of its own.

        Raises ValueError; a server that is away is found out later.
        """
        if not urls:
            raise ValueError("no kv server: set PDTASKS_KV_URLS or start one with `pdtasks up`")
        if len(urls) > 1 and any(url.startswith(_CLUSTER) for url in urls):
            raise ValueError("PDTASKS_KV_URLS: give one node of a cluster, it knows the others")
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._own = threading.local()
        self._connections: set[BlockConnection] = set()  # of all threads, for `close`
        self._lock = threading.Lock()
        self._servers: _Servers = (
            _Cluster(urls[0].removeprefix(_CLUSTER), timeout_s)
            if urls[0].startswith(_CLUSTER)
            else _Independent(urls, timeout_s)
        )

    def put(self, key: str, parts: Sequence[memoryview], deadline: float | None = None) -> None:
        """Store the concatenation of `parts` under `key`.

        Args:
        parts: any number of bytes below the server's `proto-max-bulk-len`.
        deadline: `time.monotonic()` at which to give up.

        Raises StoreError; nothing is stored then, or the whole value.
        """
        until = self._until(deadline)
        self._with_connection(key, until, lambda c: c.put(key.encode(), parts, self._ttl_s, until))

    def get(self, key: str, parts: Sequence[memoryview], deadline: float | None = None) -> bool:
        """Receive the value of `key` into `parts`; False when the store does not have it.

        Raises StoreError, and UnexpectedValue when the value does not fill `parts` exactly.
        """
        until = self._until(deadline)
        return self._with_connection(key, until, lambda c: c.get(key.encode(), parts, until))

    def touch(self, keys: Sequence[str]) -> list[bool]:
        """Renew the TTL of `keys`; tells for each whether the store has it. Raises StoreError."""
        found = dict.fromkeys(keys, False)
        for server, own in self._by_server(keys):
            with self._watching(), server.pipeline(transaction=False) as batch:
                for key in own:
                    batch.expire(key, self._ttl_s)
                found.update(zip(own, map(bool, batch.execute()), strict=True))
        return [found[key] for key in keys]

    def delete(self, keys: Iterable[str]) -> list[str]:
        """Forget `keys`; returns those that were not there.

        Raises StoreError when a server did not; all others have.
        """
        failure: StoreError | None = None
        unknown: list[str] = []
        for server, own in self._by_server(keys):
            try:
                with self._watching(), server.pipeline(transaction=False) as batch:
                    for key in own:
                        batch.unlink(key)
                    found = batch.execute()
                unknown += [key for key, there in zip(own, found, strict=True) if not there]
            except StoreError as exc:
                failure = exc
        if failure is not None:
            raise failure
        return unknown

    def close(self) -> None:
        """Close every connection."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
        self._servers.close()

    def _until(self, deadline: float | None) -> float:
        return time.monotonic() + self._timeout_s if deadline is None else deadline

    def _by_server(self, keys: Iterable[str]) -> Iterable[tuple[valkey.Valkey, list[str]]]:
        groups: dict[int, tuple[valkey.Valkey, list[str]]] = {}
        until = time.monotonic() + self._timeout_s
        for key in keys:
            server = self._servers.of(key, until)
            groups.setdefault(id(server), (server, []))[1].append(key)
        return groups.values()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Whoever knows where names live hears of the errors inside."""
        try:
            yield
        except StoreError as exc:
            self._servers.failed(exc)
            raise

    def _with_connection(self, key: str, until: float, call: Callable[[BlockConnection], T]) -> T:
        kept: dict[valkey.Valkey, BlockConnection] = self._own.__dict__.setdefault("kept", {})
        server = self._servers.of(key, until)
        self._drop_replaced(kept)
        connection = kept.pop(server, None)
        if connection is not None and connection.usable:
            try:
                with self._watching():
                    return self._call(connection, call, server, kept)
            except valkey.ConnectionError:
                pass  # the server may have closed it long ago; SET and GET may be said twice
        with self._watching():
            return self._call(self._connect(server, until), call, server, kept)

    def _drop_replaced(self, kept: dict[valkey.Valkey, BlockConnection]) -> None:
        """Close this thread's connections to servers that are none of ours any more."""
        if self._own.__dict__.get("layout") == self._servers.layout:
            return
        self._own.layout = self._servers.layout
        for server in [s for s in kept if not self._servers.has(s)]:
            connection = kept.pop(server)
            connection.close()
            with self._lock:
                self._connections.discard(connection)

    def _call(
        self,
        connection: BlockConnection,
        call: Callable[[BlockConnection], T],
        server: valkey.Valkey,
        kept: dict[valkey.Valkey, BlockConnection],
    ) -> T:
        try:
            return call(connection)
        finally:
            if connection.usable:
                kept[server] = connection
            else:
                with self._lock:
                    self._connections.discard(connection)

    def _connect(self, server: valkey.Valkey, until: float) -> BlockConnection:
        made = server.connection_pool.make_connection()
        # A server that stands still is connected to by the kernel; it is the greeting that waits.
        left = min(CONNECT_TIMEOUT_S, max(until - time.monotonic(), 1e-3))
        made.socket_connect_timeout = made.socket_timeout = left
        connection = BlockConnection(made)
        with self._lock:
            self._connections.add(connection)
        return connection


class _Servers(Protocol):
    """Which server keeps a name?"""

    layout: int  #: another number when servers have come or gone

    def of(self, key: str, until: float) -> valkey.Valkey:
        """The same object for the same server, known at `until` (monotonic). Raises StoreError."""

    def has(self, server: valkey.Valkey) -> bool:
        """Is it still one of them?"""

    def failed(self, error: StoreError) -> None:
        """A server has answered with an error, or not at all."""

    def close(self) -> None: ...


class _Independent:
    """Servers that know nothing of each other."""

    layout = 0

    def __init__(self, urls: Sequence[str], timeout_s: float) -> None:
        # Seeds come from the servers' addresses, so neither the order of the URLs nor a changed
        # password matters.
        self._seeds = [_hash(url.rpartition("@")[2]) for url in urls]
        self._servers = [
            valkey.Valkey.from_url(valkey_url(url), **_timeouts(timeout_s)) for url in urls
        ]

    def of(self, key: str, until: float) -> valkey.Valkey:
        if len(self._servers) == 1:
            return self._servers[0]
        weights = [_hash(key, seed) for seed in self._seeds]
        return self._servers[weights.index(max(weights))]

    def has(self, server: valkey.Valkey) -> bool:
        return True

    def failed(self, error: StoreError) -> None:
        pass

    def close(self) -> None:
        for server in self._servers:
            server.close()


class _Cluster:
    """A Valkey Cluster, asked for its layout at the first use and again when that has changed.

    One thread asks; whoever needs the answer waits for it within a deadline of its own.  A node
    that stands still can hold up the answer: those that know a layout go on with it after a while.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeouts = _timeouts(timeout_s)
        self._cluster: ValkeyCluster | None = None
        self._outdated = True
        self._asked_at = 0.0
        self.layout = 0
        self._asker = ThreadPoolExecutor(1, "kv-layout")
        self._lock = threading.Lock()  # never held while the network is waited for
        self._asked: Future[ValkeyCluster] | None = None
        self._asks_since = 0.0

    def of(self, key: str, until: float) -> valkey.Valkey:
        cluster = self._current(until)
        try:
            node = cluster.get_node_from_key(key)
        except ValkeyClusterException as exc:  # no ValkeyError
            self._outdated = True
            raise valkey.ConnectionError(str(exc)) from exc
        return cast("valkey.Valkey", cluster.get_valkey_connection(node))

    def _current(self, until: float) -> ValkeyCluster:
        with self._lock:
            known = self._cluster
            if not self._outdated and known is not None:
                return known
            if self._asked is None:
                self._asked = self._asker.submit(self._ask)
                self._asks_since = time.monotonic()
            asked = self._asked
            if known is not None:
                until = min(until, self._asks_since + _PATIENCE_S)
        try:
            return asked.result(max(0.0, until - time.monotonic()))
        except ValkeyClusterException as exc:  # no ValkeyError
            raise valkey.ConnectionError(str(exc)) from exc
        except (TimeoutError, CancelledError) as exc:
            if known is not None:
                return known
            raise valkey.TimeoutError("the cluster's layout is not known in time") from exc

    def _ask(self) -> ValkeyCluster:
        """In the asking thread."""
        cluster = self._cluster
        try:
            if cluster is None:
                cluster = ValkeyCluster.from_url(valkey_url(self._url), **self._timeouts)
            else:
                # Any node that was there the last time may tell it; the new layout takes the old
                # one's place in one step.
                cluster.nodes_manager.initialize()
        except BaseException:
            with self._lock:
                self._asked = None
            raise
        with self._lock:
            self._asked = None
            self._cluster, self._outdated = cluster, False
            self._asked_at = time.monotonic()
            self.layout += 1
        return cluster

    def has(self, server: valkey.Valkey) -> bool:
        cluster = self._cluster
        return cluster is not None and any(
            node.valkey_connection is server for node in cluster.get_nodes()
        )

    def failed(self, error: StoreError) -> None:
        moved = isinstance(error, AskError | ClusterDownError) or str(error) in _MOVED
        # Whoever took a lost node's place may be known only after a while.
        lost = isinstance(error, valkey.ConnectionError | valkey.TimeoutError)
        if moved or (lost and time.monotonic() >= self._asked_at + _LAYOUT_S):
            self._outdated = True

    def close(self) -> None:
        # One that still asks ends by its own timeouts.
        self._asker.shutdown(wait=False, cancel_futures=True)
        if self._cluster is not None:
            self._cluster.close()


def _timeouts(timeout_s: float) -> dict[str, Any]:
    return {"socket_timeout": timeout_s, "socket_connect_timeout": CONNECT_TIMEOUT_S}


def _hash(text: str, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), seed=seed)
