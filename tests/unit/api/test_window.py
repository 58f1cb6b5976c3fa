"""How fast was it in the last minutes?"""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from api.window import NUM_SLOTS, SLOT_S, Durations, Recently, window_of
from pdtasks.bus.apis import WindowCounts
from pdtasks.messages import StageReport


class Clock:
    """Monotonic seconds as a test has them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seconds", [0.0004, 0.02, 0.7, 31.0])
def test_a_quantile_is_within_five_percent(seconds: float) -> None:
    durations = Durations()
    for _ in range(9):
        durations.add(seconds)
    durations.add(seconds * 100)

    assert durations.quantile(0.5) == pytest.approx(seconds, rel=0.05)
    assert durations.quantile(0.99) == pytest.approx(seconds * 100, rel=0.05)


def test_durations_that_cannot_be_are_counted_as_short() -> None:
    durations = Durations()
    for seconds in (0.0, -1.0):
        durations.add(seconds)

    shortest = durations.quantile(1.0)
    assert shortest is not None
    assert 0 < shortest < 0.00001


def test_where_nothing_was_there_is_no_quantile() -> None:
    assert Durations().quantile(0.5) is None
    assert Durations.quantiles([{}]).p95_s is None


def test_a_slot_is_forgotten_when_it_is_old() -> None:
    clock = Clock()
    recently = Recently(clock)
    recently.slot(clock.now).tokens += 7
    clock.now += SLOT_S * (NUM_SLOTS - 1)
    assert recently.window().tokens == 7

    clock.now += SLOT_S
    window = recently.window()
    assert window.tokens == 0
    assert len(window.slots) == NUM_SLOTS


def test_slots_in_which_nothing_was_are_there() -> None:
    clock = Clock()
    recently = Recently(clock)
    for _ in range(2):
        recently.slot(clock.now).tokens += 1
        clock.now += 3 * SLOT_S

    slots = recently.window().slots
    assert [slot.tokens for slot in slots] == [1, 0, 0, 1, 0, 0, 0]
    assert [b.at - a.at for a, b in pairwise(slots)] == pytest.approx([SLOT_S] * 6)


def test_a_rate_is_over_the_time_that_there_was() -> None:
    clock = Clock()
    recently = Recently(clock)
    recently.slot(clock.now).tokens += 100
    clock.now += 10

    assert recently.window().tokens_per_s == pytest.approx(10)


def test_what_a_stage_says_again_counts_once() -> None:
    clock = Clock()
    recently = Recently(clock)
    early = StageReport(
        stage="prefill", worker="w", queue_s=0, seconds=1, prompt_tokens=10, output_tokens=1
    )
    late = StageReport(
        stage="prefill",
        worker="w",
        queue_s=0,
        seconds=1,
        prompt_tokens=10,
        output_tokens=1,
        kv_bytes_written=500,
    )
    recently.took(early, None)
    clock.now += SLOT_S
    recently.took(late, early)

    kv = recently.window().kv
    assert (kv.prompt_tokens, kv.bytes_written) == (10, 500)


def test_what_several_processes_counted_is_one_window() -> None:
    """Their monotonic clocks have nothing to do with each other; slots are those of wall time."""
    clocks = Clock(), Clock()
    clocks[1].now += 777 * SLOT_S
    both = [Recently(clock) for clock in clocks]
    for recently, clock, count in zip(both, clocks, (3, 1), strict=True):
        slot = recently.slot(clock.now)
        slot.tokens += count
        slot.ended += 1
        slot.kv["bytes_loaded"] += 10
        for _ in range(count):
            slot.ttft.add(0.1 * count)
        clock.now += SLOT_S

    told = [
        msgspec.msgpack.decode(msgspec.msgpack.encode(r.counts()), type=WindowCounts) for r in both
    ]
    window = window_of(told)
    assert (window.requests, window.tokens, window.kv.bytes_loaded) == (2, 4, 20)
    assert window.tokens_per_s == pytest.approx(4 / SLOT_S)
    assert window.ttft.count == 4
    assert window.ttft.p50_s == pytest.approx(0.3, rel=0.05)
    assert [(slot.tokens, slot.requests) for slot in window.slots] == [(4, 2), (0, 0)]


def test_a_young_process_beside_an_old_one_counts_for_its_own_time() -> None:
    clocks = Clock(), Clock()
    old = Recently(clocks[0])
    old.slot(clocks[0].now).tokens += 1
    clocks[0].now += SLOT_S * (NUM_SLOTS - 1)
    young = Recently(clocks[1])
    young.slot(clocks[1].now).tokens += 1

    window = window_of([old.counts(), young.counts()])
    assert window.seconds == pytest.approx(SLOT_S * (NUM_SLOTS - 1))
    assert len(window.slots) == NUM_SLOTS
    assert (window.slots[0].tokens, window.slots[-1].tokens) == (1, 1)
