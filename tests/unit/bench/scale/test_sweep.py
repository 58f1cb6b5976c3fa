"""Are all questions answered, shown and drawn?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdtasks.bench.scale.bottleneck import Load
from pdtasks.bench.scale.costs import Costs
from pdtasks.bench.scale.plot import draw_all
from pdtasks.bench.scale.report import format_live, format_model
from pdtasks.bench.scale.sweep import FOUR, first_full, rule, simulate, sweep_sizes
from pdtasks.bench.scale.validate import CASES, validate

RESULTS = Path(__file__).parents[4] / "bench" / "results"


def sizes_row(gpus: int, per_s: float, api: float) -> dict[str, Any]:
    busy = {"api": api, "bus": 0.1, "broker": 0.1, "kv": 0.1}
    return {"workload": "w", "gpus": gpus, "per_s": per_s, "one_of_each": busy}


def test_a_part_is_full_between_two_sizes_that_were_asked() -> None:
    rows = [sizes_row(2, 10, 0.5), sizes_row(4, 20, 0.75), sizes_row(8, 40, 1.25)]

    assert first_full(rows, "w") == {"api": {"gpus": 6.0, "per_s": 30.0}}


def test_a_part_that_is_full_at_the_first_size_is_so_below_it() -> None:
    assert first_full([sizes_row(4, 20, 2.0)], "w") == {"api": {"gpus": 2.0, "per_s": 10.0}}


def test_more_gpus_ask_for_more_of_each_part() -> None:
    small, large = sweep_sizes(Costs(), sizes=(8, 64))[:2]

    for name in ("api", "bus", "broker", "kv"):
        assert small["one_of_each"][name] < large["one_of_each"][name]
    assert small["needed"]["api"] < large["needed"]["api"]


def test_the_rule_gives_long_prompts_more_prefill_engines() -> None:
    by_workload = {row["workload"]: row["prefill_for_each_decode"] for row in rule()}

    assert by_workload["5000/250"] > 1 > by_workload["500/500"]


def test_all_of_it_is_shown_and_drawn(tmp_path: Path) -> None:
    figures = simulate(FOUR["2P2D"], Load(4, 500, 20), Costs(), seconds=2)
    four = [
        {"topology": name, "workload": "500/20", "rate": rate, **figures}
        for name in ("2P2D", "1P3D")
        for rate in (4, 8)
    ]
    sizes = sweep_sizes(Costs(), sizes=(2, 64))
    simulated = {"gpus": 4, "per_s": 4, "prefill": 2, "decode": 2, "apis": 1, "buses": 1}
    found = {
        "validation": validate(RESULTS, CASES[3:4]),
        "costs_us": {"api_token": 100.0},
        "sizes": sizes,
        "first_full": {"5000/250": first_full(sizes, "5000/250")},
        "simulated": [{**simulated, "kv_servers": 0, **figures}],
        "four": four,
        "rule": rule(),
    }

    shown = format_model(found)

    for told in ("pdtasks 1P1D, 2048/20", "api_token 100.0", "2P2D", "500/20", "requests/s"):
        assert told in shown
    for picture in draw_all(found, tmp_path / "img"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_live_rows_are_shown_with_what_a_request_costs() -> None:
    figures = dict.fromkeys(
        ("ttft_mean_ms", "ttft_p99_ms", "gap_mean_ms", "itl_p50_ms", "itl_p99_ms"), 12.0
    )
    row = {"size": "4P4D", "prompt": 50, "answer": 20, "slower": 10.0, "failed": 0, **figures}
    row |= {
        "offered_per_s": 3.5,
        "streams": 7.0,
        "streams_most": 9,
        "tokens_per_s": 70.0,
        "host_cpu": 0.5,
    }
    row |= {"bus_messages_per_s": 40.0, "bus_cpu_us_per_message": 99.0}
    row["cpu_ms_per_request"] = {"api": 31.0, "bus": 2.5}

    shown = format_live([row, {**row, "ttft_mean_ms": None}])

    assert "4P4D" in shown
    assert "31.0" in shown
    assert pytest.approx(len(shown.splitlines())) == 7
