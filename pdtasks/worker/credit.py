"""How many jobs of each stage does this worker take at once? As many as its engine has work for.

RabbitMQ gives a worker jobs until it has as many as it may hold (its prefetch count), and another
worker that is done sooner cannot have them.  So of prompts a worker holds what fills two steps of
its engine, the one that it computes and the next, beside those that are computed and wait for their
hand-over.  Of answers it has as many as its places.

Another count is another consumer in RabbitMQ, which does not count what the one before was given:
so more is asked for by doubling, when all credit is used, and less only when nothing is held.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from pdtasks.naming import DECODE, PREFILL

#: Steps of prompts that a worker holds.
_STEPS: Final = 2
#: Prompts that it holds at least, however long, and at first.
_LEAST_PROMPTS: Final = 2
#: Weight of each prompt in what is usual.
_NEW: Final = 0.125
#: Seconds between two times that credit is taken back, and by how much it has to be too large.
_PAUSE_S: Final = 5.0
_TOO_LARGE: Final = 2.0


class _Mean:
    """Of the values of late."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, value: float) -> None:
        self.value = value if not self.value else self.value + _NEW * (value - self.value)


class Credit:
    """Counts the prompts that a worker holds, and says how many it may. For the engine's loop."""

    def __init__(
        self,
        slots: int,
        *,
        step_tokens: int,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        slots: requests that the engine runs at once.
        step_tokens: of prompts that it computes at once.
        on_change: called when `of` has changed.
        """
        self._slots = slots
        self._step_tokens = step_tokens
        self._on_change = on_change
        self._clock = clock
        self._credit = min(slots, _LEAST_PROMPTS)
        self._usual = _Mean()  # tokens of a prompt
        self._runs: set[str] = set()
        self._computing: dict[str, int] = {}  # tokens of prompts, by run
        self._lowered_at = -math.inf

    @property
    def of(self) -> Mapping[str, int]:
        """Jobs at once, by stage."""
        return {PREFILL: self._credit, DECODE: self._slots}

    def begins(self, stage: str, run: str, prompt_tokens: int) -> None:
        """The engine gets the request of `run`, a name that no other one has."""
        if stage == PREFILL:
            self._runs.add(run)
            self._computing[run] = prompt_tokens
            self._usual.add(prompt_tokens)
            self._adjust()

    def computed(self, run: str) -> None:
        """The engine has done what it had to."""
        if self._computing.pop(run, None) is not None:
            self._adjust()

    def ends(self, run: str) -> None:
        """Its job ends here."""
        if run in self._runs:
            self._runs.discard(run)
            self._computing.pop(run, None)
            self._adjust()

    def _adjust(self) -> None:
        now, wanted = self._clock(), min(self._slots, self._wanted())
        if wanted > self._credit and len(self._runs) >= self._credit:
            # At once, for the engine could have more to do; and not by one each time.
            self._credit = min(self._slots, max(wanted, 2 * self._credit))
        elif (
            not self._runs
            and self._credit > _TOO_LARGE * wanted
            and now - self._lowered_at >= _PAUSE_S
        ):
            self._credit, self._lowered_at = wanted, now
        else:
            return
        self._on_change()

    def _wanted(self) -> int:
        # What it holds now says more than what was usual, if it is less.
        usual = max(1.0, min(self._usual.value, _mean(self._computing.values()) or math.inf))
        fill = max(_LEAST_PROMPTS, math.ceil(_STEPS * self._step_tokens / usual))
        return fill + len(self._runs) - len(self._computing)


def _mean(values: Collection[int]) -> float:
    return sum(values) / len(values) if values else 0.0
