"""`pdtasks bench batch` with a short one: every line is answered, and somebody was asked beside."""

from __future__ import annotations

import io
from pathlib import Path

from pdtasks.bench.batch import Plan, run_batch
from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.cluster.console import Console


def test_a_batch_is_run_to_its_end_and_its_figures_are_told(
    tmp_path: Path, bench_nursery: Nursery
) -> None:
    plan = Plan(lines=60, concurrency=4, seconds=1.0)

    found = run_batch(plan, tmp_path, Console(io.StringIO()), bench_nursery)

    assert (found.answered, found.failed) == (60, 0)
    assert found.steps[-1] == 60
    assert found.seconds > 0
    for p50, p99 in found.live_ms.values():
        assert 0 < p50 <= p99
    assert all(mib > 0 for of_group in found.memory_mib.values() for mib in of_group)
