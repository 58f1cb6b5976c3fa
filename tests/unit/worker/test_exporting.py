"""Where does a worker serve its metrics?"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import httpx
import pytest

from pdtasks.settings import Settings
from pdtasks.worker.exporting import Exporter


@pytest.fixture
def serve() -> Iterator[Callable[..., Exporter]]:
    made: list[Exporter] = []

    def start(**settings: object) -> Exporter:
        made.append(Exporter(Settings(**settings)))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for exporter in made:
        exporter.close()


def test_a_worker_serves_on_loopback_at_a_port_that_it_tells(
    serve: Callable[..., Exporter],
) -> None:
    first, second = serve(), serve()

    assert first.address != second.address
    for exporter in (first, second):
        assert exporter.address.startswith("127.0.0.1:")
        assert "python_info" in httpx.get(f"http://{exporter.address}/metrics").text


def test_a_port_that_is_named_is_taken_by_one_worker_and_the_next_has_a_free_one(
    serve: Callable[..., Exporter], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = serve(metrics_port=port)
    second = serve(metrics_port=port)

    assert first.address == f"127.0.0.1:{port}"
    assert httpx.get(f"http://{second.address}/metrics").status_code == 200
    assert f"port {port} for metrics" in caplog.text


def test_who_listens_everywhere_is_found_by_the_hosts_name(
    serve: Callable[..., Exporter],
) -> None:
    exporter = serve(metrics_host="0.0.0.0")

    assert exporter.address.rpartition(":")[0] == socket.gethostname()
