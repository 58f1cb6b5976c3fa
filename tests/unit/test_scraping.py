"""How does Prometheus find API processes and workers?"""

from __future__ import annotations

import asyncio
import json
import socket
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import valkey
import yaml
from fastapi import HTTPException

from api.targets import all_targets
from pdtasks.scraping import address_of, api_targets, scrape_configuration, targets
from pdtasks.settings import Settings
from tests.unit.api.core_bench import READY

WORKERS = [
    msgspec.structs.replace(READY[0], metrics="127.0.0.1:4000"),
    msgspec.structs.replace(READY[1], metrics="other:5000"),
]


def test_each_worker_that_serves_metrics_is_a_target_by_its_name() -> None:
    older = msgspec.structs.replace(READY[0], name="older@h")

    assert targets([*WORKERS, older]) == [
        {
            "targets": ["127.0.0.1:4000"],
            "labels": {"instance": "prefill1@h", "role": "prefill", "model": READY[0].model},
        },
        {
            "targets": ["other:5000"],
            "labels": {"instance": "decode1@h", "role": "decode", "model": READY[1].model},
        },
    ]


def test_api_processes_are_targets_of_a_job_of_their_own() -> None:
    assert api_targets(["a:8000", "b:8000"]) == [
        {"targets": [address], "labels": {"job": "pdtasks-api", "role": "api"}}
        for address in ("a:8000", "b:8000")
    ]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8000"),
        ("::1", "[::1]:8000"),
        ("0.0.0.0", f"{socket.gethostname()}:8000"),
    ],
)
def test_an_api_process_is_found_where_it_listens(host: str, address: str) -> None:
    assert address_of(Settings(api_host=host, api_port=8000, device="cpu")) == address


def test_the_configuration_is_yaml_that_asks_every_api_process() -> None:
    urls = ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    (job,) = yaml.safe_load(scrape_configuration(urls, asks_for_keys=False))["scrape_configs"]

    assert [found["url"] for found in job["http_sd_configs"]] == [
        "http://127.0.0.1:8000/pdtasks/targets",
        "http://127.0.0.1:8001/pdtasks/targets",
    ]
    assert "authorization" not in str(job)


def test_where_keys_are_asked_for_the_configuration_has_a_place_for_one() -> None:
    text = scrape_configuration(["https://api.example"], asks_for_keys=True)
    (job,) = yaml.safe_load(text)["scrape_configs"]

    (found,) = job["http_sd_configs"]
    assert found["url"] == "https://api.example/pdtasks/targets"
    assert found["authorization"]["credentials_file"]
    assert found["authorization"]["type"] == "Bearer"


class StubWorkers:
    """What presence says; or nothing, when the bus is away."""

    known = WORKERS

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def look(self) -> None:
        if self._error is not None:
            raise self._error


class StubNeighbours:
    """What other API processes say."""

    async def others(self) -> list[Any]:
        return [SimpleNamespace(metrics="other:8000"), SimpleNamespace(metrics="127.0.0.1:8000")]


def asked(workers: StubWorkers) -> Any:
    state = SimpleNamespace(
        pdtasks_client=SimpleNamespace(engine_core=SimpleNamespace(workers=workers)),
        pdtasks_overviews=SimpleNamespace(neighbours=StubNeighbours(), metrics="127.0.0.1:8000"),
    )
    request: Any = SimpleNamespace(app=SimpleNamespace(state=state))
    return asyncio.run(all_targets(request))


def test_the_api_tells_prometheus_who_is_there_each_once() -> None:
    apis = api_targets(["127.0.0.1:8000", "other:8000"])
    assert json.loads(json.dumps(asked(StubWorkers()))) == apis + targets(WORKERS)


def test_while_the_bus_is_away_prometheus_is_to_keep_what_it_knew() -> None:
    with pytest.raises(HTTPException) as raised:
        asked(StubWorkers(valkey.ConnectionError("gone")))

    assert raised.value.status_code == 503
