"""Is a live run planned by what GPUs can do, and does it end where it tells nothing more?"""

from __future__ import annotations

from typing import Any

import pytest

from pdtasks.bench.scale.gpu import H200
from pdtasks.bench.scale.live import LivePlan, Size, most_at_once, why_to_stop


def row(**changes: Any) -> dict[str, Any]:
    return {"host_cpu": 0.5, "own_cpu": 0.4, "failed": 0, "first_failure": None} | changes


def test_so_many_requests_come_as_gpus_could_do_a_share_of() -> None:
    plan = LivePlan(share=0.5)

    assert plan.rate(Size(2, 2), 5000, 250) == pytest.approx(H200.prompts_per_s(5000))
    slower = LivePlan(share=0.5, slower=10)
    assert slower.rate(Size(2, 2), 5000, 250) == pytest.approx(H200.prompts_per_s(5000) / 10)
    most = H200.answers_per_s(10, 1000)
    assert plan.rate(Size(4, 1), 10, 1000) == pytest.approx(0.5 * most)


def test_it_ends_where_the_host_is_full_of_it() -> None:
    assert why_to_stop([row()]) == ""
    assert "full" in why_to_stop([row(), row(host_cpu=0.97, own_cpu=0.9)])


def test_others_work_on_the_host_does_not_end_it() -> None:
    assert why_to_stop([row(host_cpu=0.97, own_cpu=0.2)]) == ""


def test_it_ends_where_requests_fail_and_says_how() -> None:
    assert "HTTP 503" in why_to_stop([row(failed=2, first_failure="HTTP 503: no worker")])


def test_the_most_streams_at_once_are_counted() -> None:
    assert most_at_once([(0, 2), (1, 3), (2, 4), (5, 6)]) == 2
    assert most_at_once([]) == 0
