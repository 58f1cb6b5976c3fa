"""How are figures written for people?"""

from __future__ import annotations

import pytest

from pdtasks.terminal.figures import duration, share, size, sparkline


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.00004, "0.0 ms"),
        (0.0423, "42.3 ms"),
        (0.0999, "100 ms"),
        (0.9996, "1.0 s"),
        (99.9, "99.9 s"),
        (99.96, "2 min"),
        (7200, "2 h 0 min"),
        (100_000, "1 d 3 h"),
    ],
)
def test_durations_have_three_digits(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_960, "10 kB"), (999_600, "1.0 MB")],
)
def test_sizes_have_three_digits(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def test_a_share_of_nothing_is_none() -> None:
    assert (share(1, 4), share(0, 0)) == ("25%", "–")


def test_a_sparkline_shows_the_last_values_and_gaps() -> None:
    assert sparkline([9, 1, None, 8], 3) == "▂ █"
    assert sparkline([0, None], 5) == "  "
