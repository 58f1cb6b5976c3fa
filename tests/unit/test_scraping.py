"""How does Prometheus find API processes and workers?"""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import valkey
import yaml
from fastapi import HTTPException

from api.targets import worker_targets
from pdtasks.scraping import scrape_configuration, targets
from tests.unit.api.core_bench import READY

WORKERS = [
    msgspec.structs.replace(READY[0], metrics="127.0.0.1:4000"),
    msgspec.structs.replace(READY[1], metrics="other:5000"),
]


def test_each_worker_that_serves_metrics_is_a_target_by_its_name() -> None:
    older = msgspec.structs.replace(READY[0], name="older@h")

    assert targets([*WORKERS, older]) == [
        {"targets": ["127.0.0.1:4000"], "labels": {"instance": "prefill1@h", "role": "prefill"}},
        {"targets": ["other:5000"], "labels": {"instance": "decode1@h", "role": "decode"}},
    ]


def test_the_configuration_is_yaml_that_names_every_api_process() -> None:
    urls = ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    apis, workers = yaml.safe_load(scrape_configuration(urls, asks_for_keys=False))[
        "scrape_configs"
    ]

    assert apis["static_configs"] == [{"targets": ["127.0.0.1:8000", "127.0.0.1:8001"]}]
    (found,) = workers["http_sd_configs"]
    assert found["url"] == "http://127.0.0.1:8000/pdtasks/targets"
    assert "authorization" not in found


def test_where_keys_are_asked_for_the_configuration_has_a_place_for_one() -> None:
    text = scrape_configuration(["https://api.example"], asks_for_keys=True)
    _, workers = yaml.safe_load(text)["scrape_configs"]

    (found,) = workers["http_sd_configs"]
    assert found["authorization"]["credentials_file"]


class StubWorkers:
    """What presence says; or nothing, when the bus is away."""

    known = WORKERS

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def look(self) -> None:
        if self._error is not None:
            raise self._error


def asked(workers: StubWorkers) -> Any:
    core = SimpleNamespace(engine_core=SimpleNamespace(workers=workers))
    request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(pdtasks_client=core)))
    return asyncio.run(worker_targets(request))


def test_the_api_tells_prometheus_which_workers_there_are() -> None:
    assert json.loads(json.dumps(asked(StubWorkers()))) == targets(WORKERS)


def test_while_the_bus_is_away_prometheus_is_to_keep_what_it_knew() -> None:
    with pytest.raises(HTTPException) as raised:
        asked(StubWorkers(valkey.ConnectionError("gone")))

    assert raised.value.status_code == 503
