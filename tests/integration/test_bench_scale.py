"""`pdtasks bench scale` with tiny numbers: real services, workers and API, stub engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services as BenchServices
from pdtasks.bench.scale.bus import format_bus, run_bus
from pdtasks.bench.scale.live import LivePlan, Size, run_live
from pdtasks.bench.scale.report import format_live
from tests.integration.conftest import DELIVERY_LIMIT, Services


def test_a_stack_with_stub_engines_answers_and_tells_what_each_part_used(
    services: Services, tmp_path: Path, bench_nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the queues of these services are declared.
    monkeypatch.setenv("PDTASKS_DELIVERY_LIMIT", str(DELIVERY_LIMIT))
    theirs = BenchServices(services.rabbit, services.bus_server, services.kv_server)
    plan = LivePlan([Size(1, 1)], seconds=2, share=0.05, workloads=[(400, 20), (400, 2)])
    told: list[str] = []
    written: list[int] = []

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        written.append(len(rows))

    rows = run_live(
        plan,
        tmp_path / "stack",
        services=theirs,
        nursery=bench_nursery,
        progress=told.append,
        write=write,
    )

    assert [row["answer"] for row in rows] == [20, 2]
    assert written == [1, 2]
    for row in rows:
        assert "stub" in row["engine"]
        assert row["failed"] == 0
        assert row["answered"] > 0
        assert 0 < row["ttft_mean_ms"] <= row["ttft_p99_ms"]
        assert row["bus_messages"] >= row["answered"]
        assert set(row["cpu_ms_per_request"]) == {
            *("api", "prefill", "decode", "broker", "bus", "kv", "client"),
        }
        assert row["cpu_ms_per_request"]["api"] > 0
    assert any("1P1D, 400/20" in line for line in told)
    assert "1P1D" in format_live(rows)


def test_a_bus_takes_messages_of_many_writers_and_all_of_them_are_read() -> None:
    rows = run_bus(writers=(2,), tokens=(1, 8), seconds=0.3)

    assert [row["tokens"] for row in rows] == [1, 8]
    assert all(row["messages_per_s"] > 0 for row in rows)
    assert all(row["commands_us_per_message"] > 0 for row in rows)
    assert len(format_bus(rows).splitlines()) == 2


def test_several_buses_share_what_one_would_take() -> None:
    (row,) = run_bus(writers=(2,), tokens=(1,), seconds=0.3, buses=2)

    assert row["messages_per_s"] > 0
    assert len(row["each_bus_cores"]) == 2
    assert "buses" in format_bus([row])
