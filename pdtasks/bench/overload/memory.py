"""How much memory do the parts of a stack take, now and at most?"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import psutil

_EVERY_S = 1.0


class Memory:
    """Samples the resident memory of groups of processes. `look` is called often."""

    def __init__(self, pids: Callable[[], Mapping[str, Sequence[int]]]) -> None:
        """`pids`: of each group's processes; their children count as well."""
        self._pids = pids
        self._next_at = 0.0
        self._mib: dict[str, list[int]] = defaultdict(list)

    def look(self) -> None:
        """A sample, if it is time for one."""
        if time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + _EVERY_S
        for group, pids in self._pids().items():
            self._mib[group].append(sum(map(_rss, pids)) >> 20)

    def begin(self) -> None:
        """Forget the samples so far."""
        self._mib.clear()
        self._next_at = 0.0

    def most(self) -> dict[str, tuple[int, int]]:
        """MiB at most in the first and in the second half of the samples, by group."""
        found = {}
        for group, samples in self._mib.items():
            half = (len(samples) + 1) // 2
            found[group] = (max(samples[:half]), max(samples[half:], default=samples[-1]))
        return found


def _rss(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        members = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in members)
    except psutil.NoSuchProcess:
        return 0
