"""Which worker is meant, and may it take another role?"""

from __future__ import annotations

import pytest

from pdtasks.messages import WorkerStatus
from pdtasks.naming import BOTH, DECODE, PREFILL, role_of, stages_of
from pdtasks.roles import UnknownWorker, why_not, worker_called


def a_worker(name: str, role: str, state: str = "ready", *, computes: bool = True) -> WorkerStatus:
    return WorkerStatus(
        name=f"{name}@h",
        role=role,
        host="h",
        pid=1,
        state=state,
        short_prompt_tokens=64 if computes else 0,
    )


PREFILL1, DECODE1, DECODE2 = (
    a_worker("prefill1", PREFILL),
    a_worker("decode1", DECODE),
    a_worker("decode2", DECODE),
)


@pytest.mark.parametrize("role", [PREFILL, DECODE, BOTH])
def test_a_role_and_its_stages_name_each_other(role: str) -> None:
    assert role_of(stages_of(role)) == role


def test_a_worker_is_found_with_and_without_its_host() -> None:
    known = [PREFILL1, DECODE1]
    assert worker_called("decode1@h", known) is worker_called("decode1", known) is DECODE1


def test_an_unknown_name_is_told_those_that_there_are() -> None:
    with pytest.raises(UnknownWorker, match="no worker is called 'x': prefill1@h, decode1@h"):
        worker_called("x", [PREFILL1, DECODE1])
    with pytest.raises(UnknownWorker, match="none shows a sign of life"):
        worker_called("x", [])
    twin = WorkerStatus(name="decode1@i", role=DECODE, host="i", pid=1, state="ready")
    with pytest.raises(UnknownWorker, match="several workers are called 'decode1'"):
        worker_called("decode1", [DECODE1, twin])


@pytest.mark.parametrize(
    ("worker", "role", "known", "why"),
    [
        (DECODE2, PREFILL, [PREFILL1, DECODE1, DECODE2], ""),
        (DECODE1, BOTH, [PREFILL1, DECODE1], ""),
        (PREFILL1, BOTH, [PREFILL1, DECODE1], ""),
        # decode workers do all of it
        (PREFILL1, DECODE, [PREFILL1, DECODE1], ""),
        (PREFILL1, DECODE, [PREFILL1], ""),
        (DECODE1, PREFILL, [PREFILL1, DECODE1], "serves decode"),
        (DECODE1, PREFILL, [DECODE1, a_worker("decode2", DECODE, "starting")], "serves decode"),
        (
            PREFILL1,
            DECODE,
            [PREFILL1, a_worker("decode1", DECODE, computes=False)],
            "serves prefill, and decode workers compute no prompts",
        ),
        (a_worker("decode3", DECODE, "stalled"), BOTH, [PREFILL1, DECODE1], "is stalled"),
    ],
)
def test_nobody_is_taken_from_a_stage_that_would_be_without(
    worker: WorkerStatus, role: str, known: list[WorkerStatus], why: str
) -> None:
    found = why_not(worker, role, known)
    assert why in found
    assert bool(why) == bool(found)
