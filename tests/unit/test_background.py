"""Do background threads and tasks survive what is raised in them, and is it told?"""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from pdtasks import background
from pdtasks.background import Background
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_PAUSE_S", 0.05)


def test_a_thread_goes_on_after_a_surprise_and_ends_when_it_returns() -> None:
    beside = Background()
    runs: list[int] = []

    def body() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise KeyError("surprise")

    thread = beside.thread("worm", body)

    thread.join(5)
    assert len(runs) == 3
    assert beside.failures() == {"worm": 2}
    assert beside.problems() == []


def test_one_that_pauses_after_a_failure_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_PAUSE_S", 60)
    beside = Background()

    def body() -> None:
        raise KeyError

    thread = beside.thread("worm", body)

    wait_until(beside.problems)
    assert beside.problems() == ["worm has failed 1 times and begins again soon"]
    # and does not keep a stop waiting
    beside.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_task_goes_on_after_a_surprise() -> None:
    async def test() -> None:
        beside = Background()
        went_on = asyncio.Event()

        async def body() -> None:
            if not beside.failures()["worm"]:
                raise KeyError
            went_on.set()
            await asyncio.Event().wait()

        task = beside.task("worm", body)
        await asyncio.wait_for(went_on.wait(), 5)
        assert beside.failures() == {"worm": 1}
        assert beside.problems() == []
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(test())


def test_the_text_of_an_error_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    beside = Background()
    failed = threading.Event()

    def body() -> None:
        if not failed.is_set():
            failed.set()
            text = "canary-cause"
            try:
                int(text)
            except ValueError as exc:
                raise KeyError("canary-" + "prompt") from exc

    with caplog.at_level(logging.ERROR):
        beside.thread("worm", body).join(5)

    assert "KeyError because of ValueError" in caplog.text
    assert "canary-cause" not in caplog.text
    assert "canary-prompt" not in caplog.text
