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
    plan = Plan(rounds=2, streams=5, tokens=3)
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
    assert len(figures["rounds"]) == 2
    for side in ("pdtasks", "vllm"):
        assert set(figures[side]) == set(FIGURES)
        assert figures[side]["tokens_per_s"] > 0
    assert len([line for line in told if line.startswith("round ")]) == 2 * 2
    assert len(format_report(figures).splitlines()) == 1 + len(FIGURES)
