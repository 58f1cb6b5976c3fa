"""How much of the workers is left for one more API process?"""

from __future__ import annotations

import pytest

from pdtasks.bus.needs import fair_part


@pytest.mark.parametrize(
    ("others", "part"),
    [
        ([], 1.0),
        ([1.0], 1 / 2),
        ([1.0, 1.0], 1 / 3),
        ([0.1], 0.9),
        ([0.1, 1.0], 0.45),
        ([0.4, 0.1], 0.5),
        ([1.0] * 99, 1 / 100),
    ],
)
def test_it_is_what_others_leave_or_as_much_as_each_gets(others: list[float], part: float) -> None:
    assert fair_part(others) == pytest.approx(part)
