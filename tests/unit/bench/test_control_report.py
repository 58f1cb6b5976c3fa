"""What is told of rounds: medians of each side, and ratios within a round."""

from __future__ import annotations

import pytest

from pdtasks.bench.control.load import Done, Order, check
from pdtasks.bench.control.report import FIGURES, format_report, to_json


def figures(of: float) -> dict[str, float]:
    return dict.fromkeys(FIGURES, of)


def test_ratios_are_of_figures_of_the_same_round() -> None:
    # A machine that is twice as slow in each round is so for both.
    rounds = [
        {"pdtasks": figures(3.0 * speed), "celery_chain": figures(speed)} for speed in (1.0, 2, 4)
    ]

    told = to_json(rounds)

    assert told["pdtasks"]["chains_per_s"] == 6.0
    assert told["celery_chain"]["chains_per_s"] == 2.0
    assert set(told["ratios"].values()) == {3.0}


def test_what_the_other_side_does_not_use_has_no_ratio() -> None:
    theirs = figures(1.0) | {"kv_cpu_ms": 0.0}

    told = to_json([{"pdtasks": figures(1.0), "celery_chain": theirs}])

    assert "kv_cpu_ms" not in told["ratios"]
    assert "CPU of the kv server" in format_report(told)


def test_requests_that_end_late_are_no_part_of_the_pace() -> None:
    done = Done(ended_at=[0.5, 1.0, 1.9, 2.1], took_s=[0.5, 0.5, 0.9, 0.2])

    assert done.per_s(Order(in_flight=2, seconds=2.0)) == 1.5


def test_a_short_answer_is_none() -> None:
    with pytest.raises(RuntimeError, match="1 tokens"):
        check([7])
