"""Do the figures of a run say what its samples were?"""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdtasks.bench.serving.client import Sample
from pdtasks.bench.serving.rows import Row, format_rows, is_good, medians, quantile, summarise


def sample(*at: float) -> Sample:
    return Sample(0.0, at)


def row(**changes: Any) -> Row:
    figures = summarise([sample(0.1, 0.2)], 2, 1.0)
    about: dict[str, Any] = {
        "device": "d",
        "topology": "t",
        "workload": "w",
        "rate": 4,
        "repeat": 1,
    }
    return Row(**about | figures | {"client": "pdtasks"} | changes)


def test_the_gap_is_that_between_the_first_token_and_the_second() -> None:
    found = summarise([sample(0.1, 0.14, 0.15), sample(0.3, 0.36, 0.37)], 3, 2.0)

    assert (found["ttft_mean_ms"], found["gap_mean_ms"]) == (200, pytest.approx(50))
    assert found["gap_p99_ms"] == pytest.approx(60)
    assert found["itl_p50_ms"] == pytest.approx(40)
    assert found["e2e_mean_ms"] == pytest.approx(260)
    assert found["output_tokens_per_s"] == 3
    assert (found["requests"], found["failed"], found["recomputed_blocks"]) == (2, 0, None)


@pytest.mark.parametrize(
    ("at", "good"),
    [
        ((0.9, 0.94, 0.98), True),
        ((1.1, 1.11), False),
        ((0.1, 0.16, 0.17), False),
        ((0.1, 0.11, 0.17), False),
        ((0.1,), True),
    ],
)
def test_a_good_answer_begins_soon_and_never_pauses(at: tuple[float, ...], good: bool) -> None:
    assert is_good(sample(*at)) == good


def test_failures_count_and_one_is_shown() -> None:
    found = summarise([sample(0.1, 0.2), Sample(0.0, failure="HTTP 503")], 2, 1.0)

    assert (found["failed"], found["first_failure"]) == (1, "HTTP 503")
    assert found["goodput"] == 0
    assert summarise([Sample(0.0, failure="x")], 2, 1.0)["ttft_mean_ms"] is None


def test_what_the_stages_said_is_in_the_row() -> None:
    decode = {"queue_s": 0.002, "seconds": 0.02, "kv_seconds": 0.01, "kv_blocks_recomputed": 2}
    samples = [Sample(0.0, (0.1,), None, {"decode": decode}) for _ in range(3)]

    found = summarise(samples, 1, 1.0)

    assert found["recomputed_blocks"] == 6
    assert found["stages_ms"] == {"decode": {"queue": 2, "seconds": 20, "kv_seconds": 10}}


def test_of_several_runs_the_median_is_shown() -> None:
    rows = [row(repeat=n, ttft_mean_ms=t, goodput=t) for n, t in ((1, 5.0), (2, 50.0), (3, 6.0))]

    (middle,) = medians(rows)

    assert (middle.ttft_mean_ms, middle.goodput, middle.repeat) == (6, 6, 3)
    assert (middle.requests, middle.failed) == (3, 0)


def test_the_table_has_a_line_for_each_topology_and_rate() -> None:
    lines = format_rows(
        [row(), row(rate=0, recomputed_blocks=3), row(client="vllm bench serve")]
    ).splitlines()

    assert lines[0].split()[:6] == ["topology", "workload", "req/s", "runs", "failed", "TTFT"]
    assert lines[1].split()[:6] == ["t", "w", "4", "1", "0/1", "100"]
    assert lines[1].split()[-1] == "-"
    assert lines[2].split()[2] == "all"
    assert lines[2].split()[-1] == "3"
    assert lines[3].startswith("t (vLLM's client)")


def test_rows_are_json() -> None:
    assert json.loads(json.dumps(row().to_json()))["topology"] == "t"


def test_the_99th_percentile_of_few_is_the_worst() -> None:
    assert quantile([0.001, 0.002, 0.003], 0.99) == 3
    assert quantile([], 0.99) is None
