"""`pdtasks bench stream` with tiny numbers: every token arrives on both sides, and is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services as BenchServices
from pdtasks.bench.stream.report import FIGURES, format_report, to_json
from pdtasks.bench.stream.run import Plan, run_stream
from tests.integration.conftest import DELIVERY_LIMIT, Services


def test_both_sides_relay_every_token_and_their_figures_are_told_together(
    services: Services, tmp_path: Path, bench_nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the queues of these services are declared.
    monkeypatch.setenv("PDTASKS_DELIVERY_LIMIT", str(DELIVERY_LIMIT))
    theirs = BenchServices(services.rabbit, services.bus_server, services.kv_server)
    plan = Plan(rounds=1, streams=4, tokens=4, step_ms=500)
    told: list[str] = []

    rounds = run_stream(
        plan,
        tmp_path,
        told.append,
        ours={"pdtasks": "without_log"},
        nursery=bench_nursery,
        services=theirs,
    )

    figures = to_json(rounds)
    assert list(figures) == ["pdtasks", "vllm", "ratios", "rounds"]
    for side in ("pdtasks", "vllm"):
        found = figures[side]
        assert set(found) == set(FIGURES)
        # As the stub makes them, and not sooner: no token was there before its step.
        assert 0 < found["paced_tokens_per_s"] <= 1.1 * 4 * 1000 / 500
        assert found["tokens_per_event"] >= 1
    assert len(told) == 1
    assert len(format_report(figures).splitlines()) == 1 + len(FIGURES)
