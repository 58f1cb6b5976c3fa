"""What is told of a whole stack, where several API processes tell of themselves?"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import valkey
from fastapi import HTTPException

from api.overview import Overviews
from pdtasks.bus.apis import Share, SlotCounts, WindowCounts
from pdtasks.messages import StageReport
from pdtasks.overview import Api, InFlight, RequestView, Viewer, Way
from pdtasks.settings import Settings
from tests.unit.api.core_bench import Bench, with_bench
from tests.unit.api.test_metrics import StubQueues
from tests.unit.factories import a_request

ALICE, BOB = Viewer(key="alice"), Viewer(key="bob")
OLGA = Viewer(key="olga", sees_all=True, may_act=True)
REPORT = StageReport(
    stage="prefill", worker="w", queue_s=0, seconds=1, prompt_tokens=10, output_tokens=1
)


def a_view(name: str, at: float, key: str = "alice") -> RequestView:
    return RequestView(
        id=name,
        key=key,
        state="done",
        submitted_at=at,
        prompt_tokens=10,
        output_tokens=2,
        seconds=1.0,
        way=Way(),
        stages=(REPORT,),
    )


def a_share(pid: int, **fields: Any) -> Share:
    values: dict[str, Any] = {
        "id": str(pid),
        "api": Api(host="h", pid=pid, since=1.0, version="1", model="m"),
        "metrics": f"h:{pid}",
        "in_flight": InFlight(in_line=1, prefill=2, handover=3, decode=4),
        "oldest_s": {"prefill": 50.0},
        "counts": WindowCounts(60.0, [SlotCounts(number=1, tokens=7, ended=1)]),
    }
    return Share(**values | fields)


class StubNeighbours:
    """What the others have left on the bus; or a bus that is away."""

    def __init__(self, *shares: Share, error: Exception | None = None) -> None:
        self._shares = shares
        self._error = error

    async def others(self) -> list[Share]:
        if self._error is not None:
            raise self._error
        return list(self._shares)


class StubJobs:
    """No job."""

    async def counts(self) -> tuple[int, int]:
        return 0, 0

    async def newest(self, **_: Any) -> None:
        return None


def overviews(bench: Bench, *shares: Share, error: Exception | None = None) -> Overviews:
    jobs: Any = StubJobs()
    depths: Any = StubQueues()
    made = Overviews([bench.core], jobs, Settings(device="cpu"), depths, None)  # type: ignore[arg-type]
    made.neighbours = StubNeighbours(*shares, error=error)  # type: ignore[assignment]
    return made


def test_what_several_processes_tell_is_put_together() -> None:
    async def test(bench: Bench) -> None:
        bench.core.reports.expect(a_request("own"), owner="alice")
        here = await overviews(bench).make(OLGA, 10)
        first = a_share(1, requests=(a_view("old", 2.0), a_view("older", 1.0, key="bob")))
        second = a_share(2, oldest_s={"decode": 9.0}, problems=("events has failed",))
        found = await overviews(bench, first, second).make(OLGA, 10)

        assert [api.pid for api in found.others] == [1, 2]
        assert found.in_flight == InFlight(in_line=2, prefill=4, handover=6, decode=8)
        oldest = {queue.name: queue.oldest_s for queue in found.queues}
        assert (oldest["prefill"], oldest["decode"]) == (50.0, 9.0)
        assert found.problems == ("API process 2 on h: events has failed",)
        # The newest first, of all
        assert [request.id for request in found.requests] == ["external-own", "old", "older"]
        assert [r.id for r in (await overviews(bench, first).make(OLGA, 2)).requests] == [
            *("external-own", "old"),
        ]
        assert found.window.seconds >= here.window.seconds

    with_bench(test)


def test_a_process_that_serves_several_models_is_one_and_each_model_is_told_alone() -> None:
    async def test(bench: Bench) -> None:
        first, further = (
            a_share(1, id=model, api=Api(host="h", pid=1, since=1.0, version="1", model=model))
            for model in (bench.core.model, "further")
        )
        made = overviews(bench, first, further)
        of_first = await made.make(OLGA, 10, bench.core.model)

        assert len((await made.make(OLGA, 10)).others) == 1
        assert of_first.in_flight == first.in_flight
        assert of_first.others == (first.api,)
        with pytest.raises(HTTPException, match="404"):
            await made.make(OLGA, 10, "further")  # known to others alone

    with_bench(test)


def test_a_key_sees_its_own_of_all_processes() -> None:
    async def test(bench: Bench) -> None:
        bench.core.reports.expect(a_request("own"), owner="alice")
        other = a_share(1, requests=(a_view("hers", 2.0), a_view("his", 1.0, key="bob")))
        made = overviews(bench, other)

        def ids(found: Any) -> list[str]:
            return [request.id for request in found.requests]

        assert ids(await made.make(ALICE, 10)) == ["external-own", "hers"]
        assert ids(await made.make(BOB, 10)) == ["his"]
        assert await made.report("his", ALICE) is None
        report = await made.report("his", BOB)
        assert report is not None
        assert report.sequences == ({"prefill": REPORT},)
        assert [one.id for one in report.times] == ["his"]

    with_bench(test)


@pytest.mark.parametrize(
    ("name", "is_found"),
    [("cmpl-1", True), ("cmpl-1-0", True), ("cmpl", False), ("cmpl-10", False)],
)
def test_others_requests_are_called_as_their_caller_knows_them(name: str, is_found: bool) -> None:
    async def test(bench: Bench) -> None:
        made = overviews(bench, a_share(1, requests=(a_view("cmpl-1-0", 2.0),)))
        assert (await made.report(name, OLGA) is not None) == is_found

    with_bench(test)


def test_while_the_bus_is_away_a_process_shows_its_own_and_says_so() -> None:
    async def test(bench: Bench) -> None:
        bench.core.reports.expect(a_request("own"), owner="alice")
        made = overviews(bench, error=valkey.ConnectionError("gone"))
        found = await made.make(OLGA, 10)

        assert [request.id for request in found.requests] == ["external-own"]
        assert found.problems == ("other API processes are not known: ConnectionError",)
        assert await made.report("elsewhere", OLGA) is None

    with_bench(test)


def test_a_share_is_small_and_comes_back_as_it_was() -> None:
    async def test(bench: Bench) -> None:
        for number in range(150):
            bench.core.reports.expect(a_request(f"r{number}"), owner="alice")
        made = overviews(bench)
        (own,) = made._own
        share = made._share(own, 100)
        wire = msgspec.msgpack.encode(share)

        assert msgspec.msgpack.decode(wire, type=Share) == share
        assert len(share.requests) == 100
        assert len(wire) < 100_000
        assert share.requests[0].id == "external-r149"

    with_bench(test)
