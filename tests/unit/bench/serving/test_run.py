"""Is a plan run, written down as it goes, and ended in time? With stand-ins for the servers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pdtasks.bench.serving.plan import Plan, Short, Topology, Workload
from pdtasks.bench.serving.processes import Running
from pdtasks.bench.serving.run import (
    OWN_CLIENT,
    VLLM_CLIENT,
    Found,
    Run,
    Runner,
    Wanted,
    arrivals_of,
)
from pdtasks.cluster.process import StartFailed
from tests.unit.bench.serving.stub_server import StubServer, running

PLAN = Plan(
    topologies={
        "one": Topology(kind="engines", devices=[[0]]),
        "ours": Topology(kind="pdtasks", prefill=1, devices=[[0], [1]]),
        "broken": Topology(kind="engines", devices=[[0], [1]]),
    },
    workloads={
        "short": Workload(prompt=5, answer=3, rates=[0, 100], requests=4),
        "long": Workload(prompt=5, answer=3, rates=[1], seconds=60),
        "mixed": Workload(prompt=5, answer=3, rates=[0], requests=2, short=Short(2, 2)),
    },
    engine={"max_model_len": 64},
)


class Farm:
    """Starts stubs instead of engines."""

    def __init__(self) -> None:
        self.server = StubServer()
        self.started: list[str] = []
        self.now_running = 0

    @contextmanager
    def start(
        self, topology: Topology, *, engine: Mapping[str, Any], folder: Path, limit_s: float
    ) -> Iterator[Running]:
        assert (engine, limit_s > 0) == ({"max_model_len": 64}, True)
        if topology is PLAN.topologies["broken"]:
            raise StartFailed("no memory")
        self.started.append(topology.kind)
        self.now_running += 1
        assert self.now_running == 1
        try:
            with running(self.server.app()) as url:
                yield Running(url, topology.kind == "pdtasks")
        finally:
            self.now_running -= 1


@pytest.fixture
def farm() -> Farm:
    return Farm()


def run(farm: Farm, out: Path, wanted: Wanted, limit_s: float = 50.0) -> Found:
    said: list[str] = []
    runner = Runner(
        PLAN, farm.start, tokenizer="t", machine="two stubs", out=out, limit_s=limit_s,
        progress=said.append,
    )  # fmt: skip
    found = runner.run(wanted)
    assert set(found.problems) <= set(said)
    return found


def test_each_topology_is_asked_the_same_and_ended_before_the_next(
    farm: Farm, tmp_path: Path
) -> None:
    found = run(farm, tmp_path, Wanted(["one", "ours"], ["short"], repeats=2))

    assert farm.started == ["engines", "pdtasks"]
    assert found.problems == []
    assert [(r.topology, r.rate, r.repeat) for r in found.rows] == [
        (topology, rate, repeat)
        for topology in ("one", "ours")
        for repeat in (1, 2)
        for rate in (0, 100)
    ]
    assert {(r.requests, r.failed, r.client, r.device) for r in found.rows} == {
        (4, 0, OWN_CLIENT, "two stubs")
    }
    assert [r.recomputed_blocks for r in found.rows] == [None] * 4 + [4] * 4


def test_what_was_measured_is_written_as_it_goes(farm: Farm, tmp_path: Path) -> None:
    found = run(farm, tmp_path, Wanted(["one", "broken"], ["short"], rates=[50]))

    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == [r.to_json() for r in found.rows]
    assert [row["rate"] for row in rows] == [50]
    assert json.loads((tmp_path / "problems.json").read_text()) == ["broken: no memory"]


def test_nothing_begins_that_would_not_end_in_time(farm: Farm, tmp_path: Path) -> None:
    found = run(farm, tmp_path, Wanted(["one"], ["long", "short"]), limit_s=40)

    assert [r.workload for r in found.rows] == ["short", "short"]
    assert found.problems == ["one, long at 1/s, run 1, pdtasks: not run, no time was left"]
    assert run(farm, tmp_path, Wanted(["ours"], ["short"]), limit_s=1).problems == [
        "ours: not run, no time was left"
    ]


def test_answers_that_fail_are_a_problem(farm: Farm, tmp_path: Path) -> None:
    farm.server.status = 503

    found = run(farm, tmp_path, Wanted(["one"], ["short"], rates=[0]))

    assert found.rows[0].failed == 4
    assert "4 failed, one with HTTP 503" in found.problems[0]


def test_answers_are_compared_with_the_first_topologys(farm: Farm, tmp_path: Path) -> None:
    found = run(farm, tmp_path, Wanted(["one", "ours"], [], exact=True))

    assert [(c.topology, c.reference, c.same_tokens) for c in found.exact] == [
        ("one", "one", 20),
        ("ours", "one", 20),
    ]
    assert found.exact[1].blocks_loaded == 20 * 11
    assert json.loads((tmp_path / "exact.json").read_text())[1]["blocks_recomputed"] == 20


def test_answers_that_differ_are_a_problem(farm: Farm, tmp_path: Path) -> None:
    runner = Wanted(["one", "ours"], [], exact=True)
    start = farm.start

    @contextmanager
    def changed(topology: Topology, **rest: Any) -> Iterator[Running]:
        farm.server.short_by = len(farm.started)
        with start(topology, **rest) as it:
            yield it

    farm.start = changed  # type: ignore[method-assign]
    found = run(farm, tmp_path, runner)

    assert any("20 of 20 answers differ from those of one" in p for p in found.problems)


def test_vllms_client_cannot_mix_lengths(farm: Farm, tmp_path: Path) -> None:
    found = run(farm, tmp_path, Wanted(["one"], ["mixed"], clients=[OWN_CLIENT, VLLM_CLIENT]))

    assert [r.client for r in found.rows] == [OWN_CLIENT]
    assert "cannot mix lengths" in found.problems[0]


def test_requests_come_at_the_same_times_in_all_topologies_and_at_others_in_the_next_run() -> None:
    def pauses(topology: str, repeat: int) -> list[float]:
        arrivals = arrivals_of(Run(topology, "long", 4, repeat, OWN_CLIENT))
        return [arrivals.expovariate(4) for _ in range(5)]

    assert pauses("one", 1) == pauses("ours", 1)
    assert pauses("one", 1) != pauses("one", 2)
