"""More than the stack can do: the rest is told when to come again. With stub engines."""

from __future__ import annotations

import io
from pathlib import Path

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.overload.report import format_report, to_json
from pdtasks.bench.overload.run import Plan, run_overload
from pdtasks.cluster.console import Console


def test_a_flood_is_refused_with_a_time_to_come_again_and_harms_nobody(
    tmp_path: Path, bench_nursery: Nursery
) -> None:
    plan = Plan(seconds=4.0, times=4.0, measure_s=4.0, come_again_s=3.0, max_waiting=10, tokens=30)

    found = run_overload(plan, tmp_path, Console(io.StringIO()), bench_nursery)

    shown = format_report(found)
    assert not found.is_bad, shown
    flood = to_json(found)["flood"]
    assert flood["refused"] > 0, shown
    assert flood["right"] + flood["refused"] == flood["asked"]
    # nobody waits longer than the line is long
    assert flood["answer_s"]["most"] < 15, shown
    assert 1 <= flood["retry_after_s"]["least"] <= flood["retry_after_s"]["most"] <= 60
    assert found.per_s_afterwards > found.per_s / 3, shown
    assert found.again is not None
    assert found.again.retry_after_s, shown
