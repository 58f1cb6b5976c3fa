"""What became of a request? Its times, as the API saw them."""

from __future__ import annotations

from api.reports import Reports
from api.route import Route
from pdtasks.messages import StageReport
from pdtasks.overview import RequestView
from tests.unit.api.core_bench import Bench, with_bench
from tests.unit.api.test_window import Clock
from tests.unit.factories import a_request, an_output


def shown(reports: Reports) -> RequestView:
    (view,) = reports.newest(10, lambda _: True)
    return view


def test_the_way_of_an_answer_is_its_whole_time() -> None:
    clock = Clock()
    reports = Reports(clock)
    record = reports.expect(a_request())
    record.published(Route.SPLIT)
    clock.now += 0.5
    record.take_tokens(1, clock.now)
    clock.now += 0.25
    record.take_tokens(1, clock.now)
    clock.now += 2
    record.take_tokens(4, clock.now)
    record.end("done", clock.now)
    reports.take(
        "r",
        [
            StageReport(
                stage="prefill",
                worker="w",
                queue_s=0.125,
                seconds=0.3,
                prompt_tokens=10,
                output_tokens=1,
            )
        ],
        said_by="prefill",
    )
    clock.now += 100

    view = shown(reports)
    way = view.way
    assert (view.first_s, view.second_s, view.seconds) == (0.5, 0.75, 2.75)
    assert (way.queue_s, way.prefill_s, way.handover_s, way.decode_s) == (0.125, 0.375, 0.25, 2)
    assert (view.state, view.output_tokens, view.prompt_tokens) == ("done", 6, 10)
    window = reports.recently.window()
    assert (window.requests, window.tokens) == (1, 6)
    assert (window.ttft.count, window.gap.count, window.itl.count) == (1, 1, 1)


def test_a_host_whose_clock_is_wrong_spoils_no_way() -> None:
    clock = Clock()
    reports = Reports(clock)
    record = reports.expect(a_request())
    clock.now += 1
    record.take_tokens(1, clock.now)
    for queue_s in (-5.0, 5.0):
        report = StageReport(
            stage="prefill",
            worker="w",
            queue_s=queue_s,
            seconds=1,
            prompt_tokens=10,
            output_tokens=1,
        )
        reports.take("r", [report], said_by="prefill")
        way = shown(reports).way

        assert min(way.queue_s, way.prefill_s) >= 0
        assert way.queue_s + way.prefill_s == 1


def test_a_request_is_shown_in_the_state_that_it_is_in() -> None:
    async def test(bench: Bench) -> None:
        def states() -> list[str]:
            return [view.state for view in bench.core.reports.newest(9, lambda _: True)]

        bench.broker.hangs = True
        await bench.core.add_request_async(a_request("r"))
        assert states() == ["line"]
        await bench.sent(1)
        assert states() == ["prefill"]
        bench.broker.unsent[0].set_result(None)
        await bench.published()
        for place, state in ((0, "handover"), (1, "decode")):
            await bench.take((place, an_output([place])))
            assert states() == [state]
        await bench.core.abort_requests_async(["r"])
        assert states() == ["stopped"]

    with_bench(test)


def test_requests_of_others_are_not_shown() -> None:
    reports = Reports()
    for owner in ("alice", "bob", "alice"):
        reports.expect(a_request(f"r{owner}{len(reports._known)}"), owner)

    newest = reports.newest(10, lambda owner: owner == "alice")
    assert [view.key for view in newest] == ["alice", "alice"]
    assert len(reports.newest(1, lambda _: True)) == 1


def test_the_way_of_an_answer_of_one_worker_has_no_hand_over() -> None:
    clock = Clock()
    reports = Reports(clock)
    record = reports.expect(a_request())
    record.published(Route.SHORT_PROMPT)
    assert shown(reports).state == "decode"
    clock.now += 0.5
    record.take_tokens(1, clock.now)
    assert shown(reports).state == "decode"
    clock.now += 0.25
    record.take_tokens(1, clock.now)
    record.end("done", clock.now)
    report = StageReport(
        stage="decode",
        worker="w",
        queue_s=0.125,
        seconds=0.6,
        prompt_tokens=10,
        output_tokens=2,
        cached_tokens=3,
        is_whole=True,
    )
    reports.take("r", [report], said_by="decode")

    view = shown(reports)
    way = view.way
    assert (way.queue_s, way.prefill_s, way.handover_s, way.decode_s) == (0.125, 0.375, 0, 0.25)
    assert (view.state, view.route) == ("done", "short_prompt")
    flow = reports.recently.window().kv
    assert (flow.prompt_tokens, flow.cached_tokens, flow.blocks_loaded) == (10, 3, 0)


def test_a_request_waits_for_the_stage_whose_first_token_it_has_not() -> None:
    reports = Reports()
    split, whole = (reports.expect(a_request(name)) for name in ("split", "whole"))
    assert (split.waits_for, whole.waits_for) == ("prefill", "prefill"), "in line"
    split.published(Route.SPLIT)
    whole.published(Route.SHORT_PROMPT)
    assert (split.waits_for, whole.waits_for) == ("prefill", "decode")
    for one in (split, whole):
        one.take_tokens(1, 1.0)
    assert (split.waits_for, whole.waits_for) == ("decode", "")
    split.take_tokens(1, 2.0)
    assert split.waits_for == ""
    split.end("done", 3.0)
    assert split.waits_for == ""
