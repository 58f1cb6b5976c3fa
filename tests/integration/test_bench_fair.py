"""`pdtasks bench fair` with tiny numbers: a tenant is answered beside each kind of pile."""

from __future__ import annotations

import io
from pathlib import Path

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.fair.run import Plan, run_fair
from pdtasks.cluster.console import Console


def test_a_tenant_is_answered_beside_all_that_another_asks_for(
    tmp_path: Path, bench_nursery: Nursery
) -> None:
    plan = Plan(jobs=20, at_once=8, answers=6, seconds=1.0, in_line_s=0.5)

    figures = run_fair(plan, tmp_path, Console(io.StringIO()), bench_nursery)

    assert list(figures) == [
        "alone",
        "beside_requests",
        "beside_many_answers",
        "beside_many_prompts",
        "beside_jobs",
    ]
    for phase, found in figures.items():
        assert found["answers"] > 0, phase
        assert 0 < found["ms_p50"] <= found["ms_p99"]
        # The pile was one
        assert phase in ("alone", "beside_jobs") or found["others_per_s"] > 0
