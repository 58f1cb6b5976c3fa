"""How full are the kv servers? A worker's look at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import valkey

from pdtasks.background import Background
from pdtasks.messages import StoreFigures
from pdtasks.worker import store_figures
from pdtasks.worker.store_figures import StoreWatch
from tests.waiting import wait_until

INFO = {
    "used_memory": 70,
    "maxmemory": 100,
    "keyspace_hits": 5,
    "keyspace_misses": 1,
    "evicted_keys": 2,
}
FIGURES = StoreFigures(used_bytes=70, max_bytes=100, hits=5, misses=1, evicted=2)
SECOND = msgspec.structs.replace(FIGURES, server=1)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """What each URL's server answers."""
    answers: dict[str, Callable[[], Any]] = {}

    class Client:
        def __init__(self, url: str) -> None:
            self._url = url

        def info(self) -> Any:
            return answers[self._url]()

        @classmethod
        def from_url(cls, url: str, **_: Any) -> Client:
            return cls(url)

        def close(self) -> None:
            """Nothing is open."""

    monkeypatch.setattr(valkey, "Valkey", Client)
    monkeypatch.setattr(store_figures, "_LOOK_S", 0.01)
    return answers


def raising(error: Exception) -> Callable[[], Any]:
    def info() -> Any:
        raise error

    return info


@pytest.mark.parametrize(
    "error",
    [valkey.ConnectionError("away"), valkey.exceptions.NoPermissionError("no"), OSError("gone")],
)
def test_a_server_that_does_not_tell_has_no_figures_until_it_does(
    error: Exception, servers: dict[str, Callable[[], Any]]
) -> None:
    servers["valkey://a"] = lambda: INFO
    servers["valkey://b"] = raising(error)
    background = Background()
    watch = StoreWatch(["valkey://a", "cluster+valkey://b"], background)
    try:
        wait_until(lambda: watch.found == (FIGURES,))
        servers["valkey://b"] = lambda: INFO
        wait_until(lambda: watch.found == (FIGURES, SECOND))
        servers["valkey://a"] = raising(error)
        wait_until(lambda: watch.found == (SECOND,))
        assert background.problems() == []
    finally:
        watch.close()
