"""How full are the kv servers? Asked now and then, for the worker's sign of life."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, cast

import valkey

from pdtasks.background import Background
from pdtasks.messages import StoreFigures
from pdtasks.tls import valkey_url

#: Seconds between two looks, and for one answer.
_LOOK_S: Final = 10.0
_ANSWER_S: Final = 2.0
#: Of a cluster the node that the URL names is asked.
_CLUSTER: Final = "cluster+"


class StoreWatch:
    """A thread that asks. A server that is away, or does not allow it, has no figures."""

    def __init__(self, urls: Sequence[str], background: Background) -> None:
        self.found: tuple[StoreFigures, ...] = ()  #: read from any thread
        self._clients = [
            valkey.Valkey.from_url(
                valkey_url(url).removeprefix(_CLUSTER),
                socket_timeout=_ANSWER_S,
                socket_connect_timeout=_ANSWER_S,
            )
            for url in urls
        ]
        self._closed = threading.Event()
        background.thread("kv-figures", self._run)

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            found = []
            for server, client in enumerate(self._clients):
                with suppress(valkey.ValkeyError, OSError):
                    found.append(_figures(server, cast("dict[str, Any]", client.info())))
            self.found = tuple(found)
            self._closed.wait(_LOOK_S)
        for client in self._clients:
            client.close()


def _figures(server: int, info: dict[str, Any]) -> StoreFigures:
    return StoreFigures(
        server=server,
        used_bytes=info["used_memory"],
        max_bytes=info["maxmemory"],
        hits=info["keyspace_hits"],
        misses=info["keyspace_misses"],
        evicted=info["evicted_keys"],
    )
