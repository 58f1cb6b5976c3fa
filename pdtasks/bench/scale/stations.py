"""Queues of the simulation: whatever serves one after the other, in the order of coming.

SimPy keeps the clock and the events.  A station needs no process of its own: with one server, first
come, first served, a visit ends `service` after the later of its coming and the end of the one
before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import simpy


class Station:
    """Some servers in front of one queue, first come, first served."""

    def __init__(self, env: simpy.Environment, name: str, servers: int = 1) -> None:
        self.name = name
        self._env = env
        self._free_at = [0.0] * servers
        self._busy_s = 0.0
        self._visits = 0

    def visit(self, service_s: float) -> float:
        """Come now, for so long; returns when the visit ends."""
        start = max(self._env.now, self._free_at[0])
        heapq.heapreplace(self._free_at, start + service_s)
        self._busy_s += service_s
        self._visits += 1
        return start + service_s

    def then(self, service_s: float, done: Callable[[], None], delay_s: float = 0.0) -> None:
        """Come now; `done` is called when the visit has ended, and `delay_s` after it."""
        later(self._env, self.visit(service_s) + delay_s - self._env.now, done)

    def utilisation(self, seconds: float) -> float:
        """What was asked of it, by what its servers can do in `seconds`; above 1 some waits."""
        return self._busy_s / seconds / len(self._free_at)


def later(env: simpy.Environment, delay_s: float, done: Callable[[], None]) -> None:
    """Call `done` after `delay_s`."""
    env.timeout(max(0.0, delay_s)).callbacks.append(lambda _: done())
