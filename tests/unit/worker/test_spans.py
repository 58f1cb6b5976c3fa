"""What does a trace show of a stage?"""

from __future__ import annotations

import time
from typing import Any

import pytest

from pdtasks.messages import StageReport
from pdtasks.tracing import NO_TRACER, OF_NO_TRACE, Carried
from pdtasks.worker.spans import StageSpan
from tests.spans import Kept, id_of, parent_of, seconds

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
BEGAN = 1000.0


class Clock:
    """UNIX seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = BEGAN
        monkeypatch.setattr("pdtasks.worker.spans.time.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def kept() -> Kept:
    return Kept()


def record(**fields: Any) -> dict[str, Any]:
    return {"blocks": 3, "bytes": 300, "missing": 0, "seconds": 0.25, "error": ""} | fields


def report(stage: str, **fields: Any) -> StageReport:
    return StageReport(
        stage=stage,
        worker="w@h",
        queue_s=1.0,
        seconds=2.0,
        prompt_tokens=40,
        output_tokens=1,
        **fields,
    )


def sent(at: float) -> Carried:
    return Carried(parent=PARENT, sent_at=at)


def test_prefill_shows_queue_compute_save_and_publish_one_after_the_other(
    kept: Kept, clock: Clock
) -> None:
    span = StageSpan(
        kept.tracer, sent(BEGAN - 3), "prefill", BEGAN, {"pdtasks.worker": "prefill1@h"}
    )
    span.given()
    clock.now = BEGAN + 1
    span.made()
    span.published(BEGAN + 1, 0.5)
    span.moved("save", [record(), record(seconds=0.5)], BEGAN + 1.75)
    clock.now = BEGAN + 2
    span.end("done", report("prefill", kv_blocks_written=3, kv_bytes_written=600), "")

    whole = kept.named("prefill")
    assert parent_of(whole) == 0xB7AD6B7169203331
    assert seconds(whole) == (BEGAN - 3, BEGAN + 2)
    parts = {s.name: seconds(s) for s in kept.spans if parent_of(s) == id_of(whole)}
    assert parts == {
        "queue": (BEGAN - 3, BEGAN),
        "compute": (BEGAN, BEGAN + 1),
        "publish": (BEGAN + 1, BEGAN + 1.5),
        "save": (BEGAN + 1.25, BEGAN + 1.75),
    }
    assert dict(kept.named("save").attributes or {}) == {
        "pdtasks.kv.blocks": 3,
        "pdtasks.kv.bytes": 600,
        "pdtasks.kv.blocks_missing": 0,
    }
    attributes = whole.attributes or {}
    assert attributes["pdtasks.worker"] == "prefill1@h"
    assert attributes["pdtasks.kv.bytes_written"] == 600
    assert attributes["gen_ai.usage.prompt_tokens"] == 40
    assert attributes["pdtasks.outcome"] == "done"


def test_decode_loads_before_it_generates(kept: Kept, clock: Clock) -> None:
    span = StageSpan(kept.tracer, sent(BEGAN - 1), "decode", BEGAN, {})
    span.given()
    clock.now = BEGAN + 4
    span.made()
    span.moved("load", [record()], BEGAN + 0.25)
    span.end("done", report("decode", kv_blocks_loaded=3, kv_bytes_loaded=300), "")

    times = {s.name: seconds(s) for s in kept.spans}
    assert times == {
        "queue": (BEGAN - 1, BEGAN),
        "load": (BEGAN, BEGAN + 0.25),
        "generate": (BEGAN + 0.25, BEGAN + 4),
        "decode": (BEGAN - 1, BEGAN + 4),
    }
    # They fill the stage: nothing of its time is unaccounted for.
    begins, ends = zip(*sorted(times[n] for n in ("queue", "load", "generate")), strict=True)
    assert begins[1:] == ends[:-1]
    assert (begins[0], ends[-1]) == times["decode"]


def test_why_kv_was_computed_again_is_told(kept: Kept, clock: Clock) -> None:
    span = StageSpan(kept.tracer, sent(BEGAN), "decode", BEGAN, {})
    span.end("done", report("decode", kv_blocks_recomputed=3), "missing")

    attributes = kept.named("decode").attributes or {}
    assert attributes["pdtasks.kv.blocks_recomputed"] == 3
    assert attributes["pdtasks.kv.why_recomputed"] == "missing"


@pytest.mark.parametrize(
    ("outcome", "is_error"),
    [("failed", True), ("late", True), ("refused", True), ("aborted", False), ("done", False)],
)
def test_what_went_wrong_is_an_error(
    outcome: str, is_error: bool, kept: Kept, clock: Clock
) -> None:
    StageSpan(kept.tracer, sent(BEGAN), "decode", BEGAN, {}).end(outcome, None, "")

    span = kept.named("decode")
    assert span.status.is_ok is not is_error
    assert (span.attributes or {}).get("error.type") == (outcome if is_error else None)


def test_the_next_stage_is_a_child_of_the_asker(kept: Kept) -> None:
    assert StageSpan(kept.tracer, sent(BEGAN), "prefill", BEGAN, {}).headers == PARENT


def test_without_an_asker_that_traces_the_first_stage_begins_the_trace(
    kept: Kept, clock: Clock
) -> None:
    first = StageSpan(kept.tracer, OF_NO_TRACE, "prefill", BEGAN, {})
    carried = Carried(parent=first.headers, sent_at=BEGAN + 1)
    second = StageSpan(kept.tracer, carried, "decode", BEGAN + 2, {})
    second.end("done", None, "")
    first.end("done", None, "")

    assert parent_of(kept.named("prefill")) is None
    assert parent_of(kept.named("decode")) == id_of(kept.named("prefill"))


def test_a_clock_that_is_ahead_makes_no_wait_negative(kept: Kept, clock: Clock) -> None:
    StageSpan(kept.tracer, sent(BEGAN + 60), "decode", BEGAN, {}).end("done", None, "")

    assert all(end >= begin for begin, end in map(seconds, kept.spans))


def test_nobody_who_does_not_trace_keeps_others_from_it() -> None:
    span = StageSpan(NO_TRACER, sent(time.time()), "prefill", time.time(), {})
    span.given()
    span.made()
    span.published(1.0, 1.0)
    span.end("done", None, "")

    assert not span.is_recorded
    assert span.headers == PARENT
