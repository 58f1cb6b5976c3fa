"""Who may come in, and when is who may not told to come again?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.admission import Admission, Visits
from pdtasks.errors import TooManyRequests
from tests.waiting import until


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Line:
    """An `Admission` that serves at a pace."""

    def __init__(self, most_waiting: int) -> None:
        self.clock = Clock()
        self.admission = Admission(most_waiting, "m", self.clock)
        self.waiting: list[str] = []
        self._number = 0

    def come(self, num: int = 1) -> None:
        for _ in range(num):
            self._number += 1
            self.admission.enter(f"r{self._number}")
            self.waiting.append(f"r{self._number}")

    def serve(self, num: int, *, seconds: float) -> None:
        for _ in range(num):
            self.clock.now += seconds / num
            self.admission.begin(self.waiting.pop(0))

    def told(self, n: int = 1) -> int:
        """Seconds after which one who is refused shall come again."""
        with pytest.raises(TooManyRequests, match="PDTASKS_MAX_WAITING") as refused:
            self.admission.require_room(n)
        return refused.value.retry_after_s


def test_requests_come_in_until_many_wait() -> None:
    line = Line(most_waiting=3)
    for _ in range(3):
        line.admission.require_room()
        line.come()

    line.told()
    line.serve(1, seconds=1)
    line.admission.require_room()


def test_what_ends_before_it_has_begun_gives_its_place_to_another() -> None:
    line = Line(most_waiting=1)
    line.come()

    line.admission.leave(line.waiting[0])

    line.admission.require_room()


def test_a_place_is_taken_from_when_it_is_given() -> None:
    async def main() -> None:
        # Given two requests that have a place each, and still tokenise their prompts
        line = Line(most_waiting=2)
        enters, ends, fails = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def route(scope: Any, receive: Any, send: Any) -> None:
            line.admission.require_room()
            if scope["path"] == "/valid":
                await asyncio.create_task(enter())
                await ends.wait()
            else:
                await fails.wait()

        async def enter() -> None:  # in a task of its own, as vLLM's are
            await enters.wait()
            line.come()

        valid, invalid = (
            asyncio.create_task(Visits(route)({"path": path}, receive, send))
            for path in ("/valid", "/invalid")
        )
        await asyncio.sleep(0)

        # Then there is none for a third, entered or not
        line.told()
        enters.set()
        await until(lambda: bool(line.waiting))
        line.told()

        # until one ends without having entered; the other keeps its place until it is served
        fails.set()
        await invalid
        line.admission.require_room()
        line.told(2)
        ends.set()
        await valid
        line.told(2)
        line.serve(1, seconds=1)
        line.admission.require_room(2)

    asyncio.run(main())


async def receive() -> Any:
    """Nothing comes."""


async def send(_message: Any) -> None:
    """Nobody listens."""


def test_one_with_many_sequences_may_come_in_while_nobody_waits() -> None:
    line = Line(most_waiting=3)
    line.admission.require_room(500)

    line.come()
    line.admission.require_room(2)
    line.told(3)


def test_who_is_refused_is_told_when_there_is_room_at_the_pace_of_late() -> None:
    # Given two requests that begin each second, and no room
    line = Line(most_waiting=40)
    line.come(50)
    line.serve(10, seconds=5)
    assert len(line.waiting) == 40

    # Then the tenth that is refused is told to come when ten have begun: the pace is that of the
    # last 10 s, of which the first 5 were idle
    told = [line.told() for _ in range(10)]
    assert told[0] == 1
    assert told[-1] == 10
    assert told == sorted(told)

    # and when the pace is faster, sooner
    line.come(100)
    line.serve(100, seconds=5)
    assert line.told() <= 10


def test_places_that_were_promised_are_forgotten_when_the_line_is_short() -> None:
    line = Line(most_waiting=10)
    line.come(20)
    line.serve(10, seconds=10)
    assert [line.told() for _ in range(20)][-1] == 20

    line.serve(6, seconds=6)
    line.admission.require_room()
    line.come(6)

    assert line.told() <= 2


def test_nobody_is_told_to_come_at_once_or_in_an_hour() -> None:
    line = Line(most_waiting=1)
    line.come()

    told = [line.told() for _ in range(1000)]

    assert told[0] == 10  # nothing has begun lately
    assert max(told) == 60

    quick = Line(most_waiting=1)
    quick.come(1001)
    quick.serve(1000, seconds=1)
    assert quick.told() == 1
