"""The order of a run: a stack, every answer undisturbed, load and faults, the tally."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pdtasks.bench.chaos.faults import Acting, Faults
from pdtasks.bench.chaos.load import SLACK_S, Known, Load, Mix
from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.questions import Question, make_questions
from pdtasks.bench.chaos.schedule import Kind, Planned
from pdtasks.bench.chaos.stack import ChaosStack, EngineKind
from pdtasks.bench.chaos.tally import (
    Answer,
    Killed,
    Saw,
    Story,
    Tally,
    count,
    longest_wait,
)
from pdtasks.bench.loop_thread import LoopThread
from pdtasks.cluster.console import Console
from pdtasks.errors import PdtasksError

T = TypeVar("T")

#: Seconds after the end of a fault in which a wait still counts as its.
_AFTERMATH_S = 1.0
#: Seconds in which workers forget requests that have ended.
_TIDY_S = 20.0
#: Seconds that the clients get to begin, and to end.
_END_S = 5.0


class NotComparable(PdtasksError):
    """The undisturbed answers are not there, or not the same twice."""


@dataclass(frozen=True)
class Plan:
    """What one run is made of."""

    faults: Sequence[Planned]
    seconds: float  #: of load; the last fault may end a little later
    seed: int  #: of the load
    engine: EngineKind = "stub"
    mix: Mix = field(default_factory=Mix)
    num_questions: int = 24
    longest: int = 120  #: tokens of an answer
    deadline_s: float = 60.0  #: of a request
    rehearse_at_once: int = 12


@dataclass(frozen=True)
class Fault:
    """One that has acted."""

    at_s: float
    kind: Kind
    target: str
    until_s: float
    longest_wait_s: float = 0.0


@dataclass(frozen=True)
class Found:
    """What came out."""

    tally: Tally
    faults: Sequence[Fault]
    left_behind: Sequence[str] = ()  #: by requests that have ended


def run_chaos(plan: Plan, home: Path, console: Console, nursery: Nursery | None = None) -> Found:
    """Run `plan` on a stack of its own under `home`, which is ended before this returns.

    Main thread only: what is started here ends with it. Raises PdtasksError when the stack does
    not start, or when a service ends that nobody has ended.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log each request
    with (
        ChaosStack(
            home, plan.engine, console, deadline_s=plan.deadline_s, nursery=nursery
        ) as stack,
        _Clients(plan, stack) as clients,
    ):
        known = _rehearse(plan, stack, clients, console)
        console.good(f"{len(known)} answers are known; the load begins")
        return _Run(plan, stack, clients, console).run(known)


class _Clients:
    """The load, in a thread of its own."""

    def __init__(self, plan: Plan, stack: ChaosStack) -> None:
        self._thread = LoopThread("load")
        self.load = Load(
            stack.urls,
            stack.settings.model_name,
            deadline_s=plan.deadline_s,
            rng=random.Random(plan.seed),  # noqa: S311 - not a secret
        )
        self._ends = ExitStack()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` there."""
        return self._thread.call(coroutine)

    def end(self) -> None:
        """Nothing new is asked."""
        self._thread.tell(self.load.end)

    def __enter__(self) -> Self:
        with ExitStack() as ends:
            ends.enter_context(self._thread)
            connected = self.load.connected()
            self.call(connected.__aenter__()).result(_END_S)
            ends.callback(lambda: self.call(connected.__aexit__(None, None, None)).result(_END_S))
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ends.close()


def _rehearse(
    plan: Plan, stack: ChaosStack, clients: _Clients, console: Console
) -> Sequence[Known]:
    """Every answer, undisturbed and twice, in different company; those that are the same twice.

    An engine's last bits depend on what else is in its batch, which may tip a close choice: such a
    question would tell nothing.
    """
    questions = make_questions(plan.seed, plan.num_questions, plan.longest)
    first = _ask_all(questions, plan.rehearse_at_once, stack, clients)
    second = _ask_all(questions, len(questions), stack, clients)
    known = [
        Known(question, one)
        for question, one, two in zip(questions, first, second, strict=True)
        if one == two
    ]
    if left_out := len(questions) - len(known):
        console.warn(f"{left_out} questions are left out: two answers, undisturbed, differ")
    if len(known) < len(questions) / 2:
        raise NotComparable("most answers are not the same when they are asked for twice")
    return known


def _ask_all(
    questions: Sequence[Question], at_once: int, stack: ChaosStack, clients: _Clients
) -> list[Answer]:
    async def ask() -> list[Story]:
        room = asyncio.Semaphore(at_once)

        async def one(question: Question) -> Story:
            async with room:
                return await clients.load.ask_once(question)

        return await asyncio.gather(*map(one, questions))

    asked = clients.call(ask())
    stack.wait(asked.done)
    return [_answer(story) for story in asked.result()]


def _answer(story: Story) -> Answer:
    """Raises NotComparable when it has none."""
    saw = [event.saw for event in story.events]
    if saw != [Saw.ACCEPTED, Saw.TOKENS, Saw.FINISHED, Saw.CLOSED]:
        raise NotComparable(f"{story.request_id} failed undisturbed: {story.timeline()}")
    tokens, finished = story.events[1], story.events[2]
    return Answer(tokens.tokens, tokens.text, finished.detail)


class _Run:
    """Load and faults side by side."""

    def __init__(self, plan: Plan, stack: ChaosStack, clients: _Clients, console: Console) -> None:
        self._plan = plan
        self._stack = stack
        self._clients = clients
        self._load = clients.load
        self._console = console
        self._faults = Faults(stack)
        self._killed: list[Killed] = []

    def run(self, known: Sequence[Known]) -> Found:
        self._load.begin(known)
        self._asking = self._clients.call(self._load.run(self._plan.mix))
        done = []
        for fault in self._plan.faults:
            self._wait_until(fault.at_s)
            done.append(self._act(fault))
        self._wait_until(self._plan.seconds)
        self._clients.end()
        patience = time.monotonic() + self._plan.deadline_s + 2 * SLACK_S
        self._console.line("the load ends: what is under way is waited for")
        self._stack.wait(lambda: self._asking.done() or time.monotonic() > patience)
        stories = list(self._load.stories)
        waits = [longest_wait(stories, f.at_s, f.until_s + _AFTERMATH_S) for f in done]
        faults = [
            replace(fault, longest_wait_s=round(wait, 2))
            for fault, wait in zip(done, waits, strict=True)
        ]
        left_behind = self._stack.left_behind(_TIDY_S)
        return Found(count(stories, self._killed), faults, left_behind)

    def _act(self, fault: Planned) -> Fault:
        at_s = self._load.now_s()
        acting = Acting("nobody")
        try:
            acting = self._faults.begin(fault)
            lasts = f" for {fault.lasts_s:.1f} s" if acting.undo else ""
            self._console.line(f"{at_s:6.1f} s  {fault.kind}: {acting.target}{lasts}")
            if acting.undo is not None:
                self._wait_until(at_s + fault.lasts_s)
        finally:
            if acting.undo is not None:
                acting.undo()
        until_s = self._load.now_s()
        if fault.kind is Kind.KILL_API:
            self._killed.append(Killed(acting.target, at_s, until_s))
        return Fault(round(at_s, 2), fault.kind, acting.target, round(until_s, 2))

    def _wait_until(self, at_s: float) -> None:
        self._stack.wait(lambda: self._asking.done() or self._load.now_s() >= at_s)
        if self._asking.done():
            self._asking.result()  # raises what has gone wrong there
