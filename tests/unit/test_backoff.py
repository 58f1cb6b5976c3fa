"""Do pauses between tries grow?"""

from __future__ import annotations

from pdtasks.backoff import Backoff


def test_pauses_double_up_to_the_maximum_and_begin_again_after_a_success() -> None:
    backoff = Backoff(first_s=0.5, maximum_s=3.0)
    assert backoff.pause_s == 0

    pauses = []
    for _ in range(5):
        backoff.fail()
        pauses.append(backoff.pause_s)
    assert pauses == [0.5, 1.0, 2.0, 3.0, 3.0]

    backoff.succeed()
    assert backoff.pause_s == 0


def test_a_million_failures_are_no_error() -> None:
    backoff = Backoff(maximum_s=10.0)

    for _ in range(1_000_000):
        backoff.fail()

    assert backoff.pause_s == 10
