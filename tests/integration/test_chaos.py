"""A short fixed schedule of faults: nothing is lost, doubled or wrong. With stub engines."""

from __future__ import annotations

import io
from pathlib import Path

from pdtasks.bench.chaos.load import Mix
from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.report import format_report, to_json
from pdtasks.bench.chaos.run import Plan, run_chaos
from pdtasks.bench.chaos.schedule import Kind, Planned
from pdtasks.bench.chaos.tally import Verdict
from pdtasks.cluster.console import Console

FAULTS = (
    Planned(1.0, Kind.KILL_API, 0.0),
    Planned(2.0, Kind.KILL_DECODE, 0.9),
    Planned(4.0, Kind.KILL_PREFILL, 0.0),
    Planned(5.0, Kind.FREEZE_BUS, 0.0, lasts_s=1.5),
    Planned(8.0, Kind.CUT_ALL, 0.0),
    Planned(10.0, Kind.FLUSH_KV, 0.0),
    Planned(10.5, Kind.STOP_WORKER, 0.9),
    Planned(12.5, Kind.RESTART_BUS, 0.0),
)


def test_nothing_is_lost_doubled_or_wrong_while_parts_fail(
    tmp_path: Path, bench_nursery: Nursery
) -> None:
    plan = Plan(
        FAULTS,
        seconds=14.0,
        seed=1,
        mix=Mix(streams=4, plain=2, jobs=2, hang_ups=1, burst=6, burst_every_s=5.0),
        num_questions=9,
        longest=40,
        deadline_s=30.0,
        rehearse_at_once=9,
    )

    found = run_chaos(plan, tmp_path, Console(io.StringIO()), bench_nursery)

    assert not found.tally.bad, format_report(found, plan.engine)
    assert found.left_behind == ()
    figures = to_json(found)
    assert [fault["kind"] for fault in figures["faults"]] == [str(f.kind) for f in FAULTS]
    assert figures["accepted"] > 0
    assert figures["right"] > figures["accepted"] / 2
    assert found.tally.verdicts[Verdict.RIGHT] == figures["right"]
