"""Does a seed say which faults come, and are they spread as they should be?"""

from __future__ import annotations

from collections import Counter

from pdtasks.bench.chaos.schedule import LASTING, Kind, make_schedule

TEN_MINUTES = 600.0


def test_the_same_seed_gives_the_same_faults_and_another_seed_others() -> None:
    assert make_schedule(7, TEN_MINUTES, set(Kind)) == make_schedule(7, TEN_MINUTES, set(Kind))
    assert make_schedule(7, TEN_MINUTES, set(Kind)) != make_schedule(8, TEN_MINUTES, set(Kind))


def test_ten_minutes_have_at_least_thirty_faults() -> None:
    assert min(len(make_schedule(seed, TEN_MINUTES, set(Kind))) for seed in range(50)) >= 30


def test_each_kind_comes_once_before_any_comes_again() -> None:
    faults = make_schedule(1, TEN_MINUTES, set(Kind))

    assert {fault.kind for fault in faults[: len(Kind)]} == set(Kind)
    times = Counter(fault.kind for fault in faults).values()
    assert max(times) - min(times) <= 1


def test_faults_follow_each_other_and_end_in_time() -> None:
    faults = make_schedule(3, TEN_MINUTES, set(Kind))

    ends = [fault.at_s + fault.lasts_s for fault in faults]
    assert all(end < later.at_s for end, later in zip(ends, faults[1:], strict=False))
    assert ends[-1] < TEN_MINUTES


def test_only_some_kinds_last() -> None:
    for fault in make_schedule(2, TEN_MINUTES, set(Kind)):
        assert (fault.lasts_s > 0) == (fault.kind in LASTING)
        assert 0 <= fault.pick < 1


def test_only_the_kinds_that_are_wanted_come() -> None:
    faults = make_schedule(1, 120.0, {Kind.CUT_ONE, Kind.FLUSH_KV})

    assert {fault.kind for fault in faults} == {Kind.CUT_ONE, Kind.FLUSH_KV}


def test_there_are_no_faults_where_there_is_no_time() -> None:
    assert make_schedule(1, 1.0, set(Kind)) == ()
