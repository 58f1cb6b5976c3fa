"""Where are blocks kept?  In one or more Valkey servers, chosen by the block's name.

Connection handling, authentication and TLS are valkey-py's.  Several servers are independent of
each other; a name always maps to the same one (rendezvous hashing, Thaler and Ravishankar 1998),
and a server that is added or removed moves only its own share of the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import valkey
import xxhash

#: Seconds to wait for a connection, and for any one answer. A slow store costs a recompute.
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0

#: What valkey-py raises when a server cannot be reached, refuses or breaks off.
StoreError = valkey.ValkeyError


class BlockStore:
    """Puts, gets and deletes values by name. Safe to use from several threads."""

    def __init__(self, urls: Sequence[str], *, ttl_s: int, max_connections: int = 16) -> None:
        """Args:
        urls: `valkey://`, `valkeys://` or `unix://` URLs of the kv servers.
        ttl_s: seconds after which an unused block disappears, in case nobody deletes it.
        max_connections: upper bound for each server.
        """
        if not urls:
            raise ValueError("no kv server: set PDTASKS_KV_URLS or start one with `pdtasks up`")
        self._ttl_s = ttl_s
        # Seeds come from the servers' addresses, so the order of the URLs does not matter.
        self._seeds = [_hash(url.rpartition("@")[2]) for url in urls]
        self._servers = [
            valkey.Valkey.from_pool(
                valkey.BlockingConnectionPool.from_url(
                    url,
                    max_connections=max_connections,
                    timeout=ANSWER_TIMEOUT_S,
                    socket_timeout=ANSWER_TIMEOUT_S,
                    socket_connect_timeout=CONNECT_TIMEOUT_S,
                )
            )
            for url in urls
        ]

    def _server(self, key: str) -> valkey.Valkey:
        if len(self._servers) == 1:
            return self._servers[0]
        weights = [_hash(key, seed) for seed in self._seeds]
        return self._servers[weights.index(max(weights))]

    def put(self, key: str, value: memoryview) -> None:
        """Store `value` (any size below the server's `proto-max-bulk-len`) under `key`.

        Raises StoreError; nothing is stored then, or the whole value.
        """
        self._server(key).set(key, value, ex=self._ttl_s)

    def get(self, key: str) -> memoryview | None:
        """Return the value, or None when the store does not have it. Raises StoreError."""
        value = cast("bytes | None", self._server(key).get(key))
        return None if value is None else memoryview(value)

    def touch(self, key: str) -> bool:
        """Renew the TTL of `key`; False when the store does not have it. Raises StoreError."""
        return bool(self._server(key).expire(key, self._ttl_s))

    def delete(self, keys: Iterable[str]) -> None:
        """Forget `keys`; unknown names are no error. Raises StoreError."""
        by_server: dict[valkey.Valkey, list[str]] = {}
        for key in keys:
            by_server.setdefault(self._server(key), []).append(key)
        for server, own in by_server.items():
            server.delete(*own)

    def close(self) -> None:
        """Close every connection."""
        for server in self._servers:
            server.close()


def _hash(text: str, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), seed=seed)
