"""`pdtasks bench observed` with tiny numbers: events and scrapes come and go with the rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pytest

from pdtasks.bench import observed
from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services as BenchServices
from pdtasks.bench.observed import FIGURES, Onlooker, Plan, format_report, run_observed, to_json
from tests.integration.conftest import DELIVERY_LIMIT, Services


def test_requests_and_tokens_are_measured_with_and_without(
    services: Services, tmp_path: Path, bench_nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the queues of these services are declared.
    monkeypatch.setenv("PDTASKS_DELIVERY_LIMIT", str(DELIVERY_LIMIT))
    theirs = BenchServices(services.rabbit, services.bus_server, services.kv_server)
    made: list[Onlooker] = []

    class Watched(Onlooker):
        def __enter__(self) -> Self:
            made.append(self)
            return super().__enter__()

    monkeypatch.setattr(observed, "Onlooker", Watched)
    told: list[str] = []
    plan = Plan(rounds=2, seconds=2.0, in_flight=4, streams=4, tokens=3)
    figures = to_json(run_observed(plan, tmp_path, theirs, told.append, bench_nursery))

    assert set(figures["on"]) == set(figures["off"]) == set(FIGURES)
    assert all(figures[side]["requests_per_s"] > 0 for side in ("on", "off"))
    assert len(told) == 2 * 2 * 2
    # Two workers; and with the API
    assert made[0].num_scrapes >= 2
    assert made[1].num_scrapes >= 3
    assert len(format_report(figures).splitlines()) == 1 + len(FIGURES)
