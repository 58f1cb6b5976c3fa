"""How may a job go on, and what can be the name of one?"""

from __future__ import annotations

import pytest

from pdtasks.bus.jobs import NEXT, State, is_event_id, is_job_id


def test_every_state_says_what_may_follow_and_all_can_end() -> None:
    assert NEXT.keys() == set(State)
    ends = {state for state in State if not NEXT[state]}

    assert ends == {State.SUCCEEDED, State.FAILED, State.CANCELLED}
    for state in set(State) - ends:
        assert ends <= NEXT[state]
        assert State.QUEUED not in NEXT[state], "a job that was begun is not new again"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("job-" + "0" * 32, True),
        ("job-" + "0" * 32 + ":events", False),
        ("job-" + "0" * 32 + "\n", False),
        ("job-nobody", False),
        ("", False),
    ],
)
def test_what_can_be_a_job(text: str, expected: bool) -> None:
    assert is_job_id(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-0", True),
        (f"{2**64 - 1}-{2**64 - 1}", True),
        (f"{2**64}-0", False),
        ("1-" + "0" * 30, False),
        ("1", False),
        ("1-2-3", False),
        ("-", False),
        ("+1-0", False),
        ("١-0", False),
        ("$", False),
    ],
)
def test_what_can_be_an_event(text: str, expected: bool) -> None:
    assert is_event_id(text) is expected
