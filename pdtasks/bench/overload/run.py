"""The order of a run: what the stack can do, ten times as much, what it can do afterwards."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.stack import ChaosStack
from pdtasks.bench.chaos.stub import STEP_S
from pdtasks.bench.loop_thread import LoopThread
from pdtasks.bench.overload.clients import Clients, Seen
from pdtasks.bench.overload.memory import Memory
from pdtasks.cluster.console import Console

T = TypeVar("T")

#: Seconds in which workers forget requests that have ended.
_TIDY_S = 20.0
_END_S = 5.0
#: A probe is as fast as before when it takes at most so many times what it took.
_AS_FAST = 2.0
_DEADLINE_S = 120.0
#: Requests that one worker runs.
_AT_ONCE = 16


@dataclass(frozen=True)
class Plan:
    """What one run is made of."""

    seconds: float = 120.0  #: of the flood
    times: float = 10.0  #: what the stack can do
    measure_s: float = 20.0  #: what it can do, before and after
    come_again_s: float = 120.0  #: of clients that come again as told; 0: none
    max_waiting: int = 50  #: requests that wait, of each API process
    tokens: int = 120  #: of an answer


@dataclass(frozen=True)
class Found:
    """What came out."""

    plan: Plan
    per_s: float  #: answers, of as many clients as the stack has room for
    flood: Seen
    flood_s: float  #: until the last of its answers
    recovered_s: float  #: after the flood's last request, until an answer was as fast as before
    per_s_afterwards: float
    again: Seen | None
    memory_mib: dict[str, tuple[int, int, int]]  #: before; at most in each half of the flood
    left_behind: Sequence[str]  #: by requests that have ended

    @property
    def is_bad(self) -> bool:
        """Has a request ended neither with its right answer nor with a 429?"""
        seen = [self.flood, *([self.again] if self.again else [])]
        return bool(self.left_behind) or any(one.failed for one in seen)


def run_overload(plan: Plan, home: Path, console: Console, nursery: Nursery | None = None) -> Found:
    """Run `plan` on a stack of its own, with stub engines, under `home`. Main thread only.

    Raises PdtasksError when the stack does not start, or a service of it ends.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log each request
    with (
        ChaosStack(
            home,
            "stub",
            console,
            deadline_s=_DEADLINE_S,
            nursery=nursery,
            max_waiting=plan.max_waiting,
            # So that a machine of two cores can ask for ten times as much.
            max_num_seqs=_AT_ONCE,
        ) as stack,
        LoopThread("clients") as thread,
    ):
        return _Run(plan, stack, thread, console).run()


class _Run:
    def __init__(self, plan: Plan, stack: ChaosStack, thread: LoopThread, console: Console) -> None:
        self._plan = plan
        self._stack = stack
        self._thread = thread
        self._console = console
        self._memory = Memory(stack.pids)
        self._clients = Clients(
            list(stack.urls.values()),
            stack.settings.model_name,
            tokens=plan.tokens,
            deadline_s=_DEADLINE_S,
        )

    def run(self) -> Found:
        plan, clients = self._plan, self._clients
        connected = clients.connected()
        self._call(connected.__aenter__())
        probe_s = statistics.median(self._call(clients.probe()) for _ in range(5))
        self._memory.begin()
        per_s = self._measure()
        before = {group: most for group, (_, most) in self._memory.most().items()}
        self._console.good(f"{per_s:.1f} answers a second; the flood begins")
        self._memory.begin()
        began = time.monotonic()
        flooding = self._thread.call(clients.flood(plan.times * per_s, plan.seconds))
        self._wait(lambda: time.monotonic() > began + plan.seconds)
        most = self._memory.most()
        self._console.line(f"{time.monotonic() - began:.0f} s: the flood ends")
        ended = time.monotonic()
        while self._call(clients.probe()) > _AS_FAST * probe_s:
            pass
        recovered_s = time.monotonic() - ended
        self._wait(flooding.done)
        flood_s = time.monotonic() - began
        self._console.good(f"as fast as before after {recovered_s:.1f} s")
        per_s_afterwards = self._measure()
        again = None
        if plan.come_again_s:
            num = round(plan.times * self._room())
            self._console.line(f"{num} clients that come again as told")
            again = self._call(clients.come_again(num, plan.come_again_s))
        left_behind = self._stack.left_behind(_TIDY_S)
        self._call(connected.__aexit__(None, None, None))
        return Found(
            plan=plan,
            per_s=per_s,
            flood=flooding.result(),
            flood_s=flood_s,
            recovered_s=recovered_s,
            per_s_afterwards=per_s_afterwards,
            again=again,
            memory_mib={group: (before[group], *halves) for group, halves in most.items()},
            left_behind=left_behind,
        )

    def _measure(self) -> float:
        """Answers a second, once all have begun."""
        seconds = self._plan.measure_s
        seen = self._call(self._clients.keep(round(self._room() * 0.75), seconds))
        from_s = 1.5 * self._plan.tokens * STEP_S
        return sum(from_s < at <= seconds for at in seen.ended_at) / (seconds - from_s)

    def _room(self) -> int:
        """Requests that run or wait at most."""
        running = self._stack.settings.max_num_seqs * sum(
            part.role == "decode" for part in self._stack.workers
        )
        return running + self._plan.max_waiting * len(self._stack.apis)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        called = self._thread.call(coroutine)
        self._wait(called.done)
        return called.result()

    def _wait(self, until: Any) -> None:
        def look() -> bool:
            self._memory.look()
            return bool(until())

        self._stack.wait(look)
