"""`pdtasks bench control` with tiny numbers: both sides answer, and what is told is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.report import FIGURES, format_report, to_json
from pdtasks.bench.control.run import Plan, run_control
from pdtasks.bench.control.stack import Services as BenchServices
from tests.integration.conftest import DELIVERY_LIMIT, Services


def test_both_sides_answer_and_their_figures_are_told_together(
    services: Services, tmp_path: Path, bench_nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the queues of these services are declared.
    monkeypatch.setenv("PDTASKS_DELIVERY_LIMIT", str(DELIVERY_LIMIT))
    theirs = BenchServices(services.rabbit, services.bus_server, services.kv_server)
    plan = Plan(rounds=1, seconds=0.5, in_flight=4, threads=4, prompt_tokens=50)
    told: list[str] = []

    figures = to_json(run_control(plan, tmp_path, theirs, told.append, bench_nursery))

    assert list(figures) == ["pdtasks", "celery_chain", "ratios", "rounds"]
    for side in ("pdtasks", "celery_chain"):
        found = figures[side]
        assert set(found) == set(FIGURES)
        assert found["chains_per_s"] > 0
        assert 0 < found["latency_ms_p50"] <= found["latency_ms_p99"]
        assert found["cpu_ms_per_request"] > 0
    assert len(told) == len(figures["rounds"]) == 1
    shown = format_report(figures)
    assert "pdtasks" in shown.splitlines()[0]
    assert len(shown.splitlines()) == 1 + len(FIGURES)
