"""How many jobs of each stage does this worker take at once? As many as its engine has work for.

RabbitMQ gives a worker jobs until it has as many as it may hold (its prefetch count), and another
worker that is done sooner cannot have them.  So a worker may hold

* of prompts, what fills two steps of its engine, the one that it computes and the next, beside
  those that are computed and wait for their hand-over;
* of answers, as many as its KV cache has room for, going by the requests of late: one more would
  have vLLM throw another one's KV away and compute it again.

More credit is given at once when all of it is used and the engine has too little to do.  Less is
given only now and then, and in two steps, for each change is a new consumer in RabbitMQ, which does
not count what the one before was given: the worker takes nothing until it holds little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from pdtasks.naming import DECODE, PREFILL

#: Steps of prompts that a worker holds.
_STEPS: Final = 2
#: Prompts that it holds at least, however long, and at first.
_LEAST_PROMPTS: Final = 2
#: Part of the KV cache that requests of the usual size may fill: some grow longer.
_KV_PART: Final = 0.9
#: Weight of each request in what is usual.
_NEW: Final = 0.125
#: Seconds between two times that credit is taken back, and by how much it has to be too large.
_PAUSE_S: Final = 5.0
_TOO_LARGE: Final = 1.5
#: What it may still hold then, as a part of its new credit.
_LITTLE: Final = 0.25


class _Mean:
    """Of the values of late."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, value: float) -> None:
        self.value = value if not self.value else self.value + _NEW * (value - self.value)


@dataclass
class _Held:
    """What this worker holds of a stage."""

    credit: int
    is_paused: bool = False  #: until it holds little of `credit`
    runs: set[str] = field(default_factory=set)
    computing: dict[str, int] = field(default_factory=dict)  #: tokens of prompts, by run
    changed_at: float = -math.inf


class Credit:
    """Counts what a worker holds, and says how much that may be. For the engine's loop."""

    def __init__(
        self,
        slots: int,
        *,
        step_tokens: int,
        kv_tokens: int,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        slots: requests that the engine runs at once.
        step_tokens: of prompts that it computes at once.
        kv_tokens: for which its cache has room; 0: not known.
        on_change: called when `of` has changed.
        """
        self._slots = slots
        self._step_tokens = step_tokens
        self._kv_tokens = kv_tokens
        self._on_change = on_change
        self._clock = clock
        self._prompt = _Mean()  # tokens of those that are computed to be handed over
        self._context = _Mean()  # tokens of a finished answer with its prompt
        self._held = {
            PREFILL: _Held(min(slots, _LEAST_PROMPTS)),
            DECODE: _Held(slots),
        }

    @property
    def of(self) -> Mapping[str, int]:
        """Jobs at once, by stage; 0: none for now."""
        return {stage: 0 if h.is_paused else h.credit for stage, h in self._held.items()}

    def begins(self, stage: str, run: str, prompt_tokens: int) -> None:
        """The engine gets the request of `run`, a name that no other one has."""
        held = self._held[stage]
        held.runs.add(run)
        held.computing[run] = prompt_tokens
        if stage == PREFILL:
            self._prompt.add(prompt_tokens)
        self._adjust(stage)

    def computed(self, stage: str, run: str) -> None:
        """The engine has done what it had to."""
        self._held[stage].computing.pop(run, None)
        self._adjust(stage)

    def ends(self, stage: str, run: str, context_tokens: int) -> None:
        """It has ended, with so many tokens of prompt and answer."""
        held = self._held[stage]
        if run not in held.runs:
            return  # it never began
        held.runs.discard(run)
        held.computing.pop(run, None)
        if stage == DECODE:
            self._context.add(context_tokens)
        self._adjust(stage)

    def _adjust(self, stage: str) -> None:
        held, now = self._held[stage], self._clock()
        wanted = min(self._slots, self._wanted(stage))
        if held.is_paused:
            held.is_paused = len(held.runs) > _LITTLE * held.credit
            if held.is_paused:
                return
            held.credit = wanted
        elif wanted > held.credit and len(held.runs) >= held.credit:
            # At once, for the engine could have more to do; and not by one each time.
            held.credit = min(self._slots, max(wanted, 2 * held.credit))
        elif held.credit > _TOO_LARGE * wanted and now - held.changed_at >= _PAUSE_S:
            held.credit = wanted
            held.is_paused = len(held.runs) > _LITTLE * wanted
        else:
            return
        held.changed_at = now
        self._on_change()

    def _wanted(self, stage: str) -> int:
        if stage == PREFILL:
            # What it holds now says more than what was usual, if it is less.
            held = self._held[stage]
            usual = max(1.0, min(self._prompt.value, _mean(held.computing.values()) or math.inf))
            fill = max(_LEAST_PROMPTS, math.ceil(_STEPS * self._step_tokens / usual))
            return fill + len(held.runs) - len(held.computing)
        if not (self._kv_tokens and self._context.value):
            return self._slots
        return max(1, int(_KV_PART * self._kv_tokens / self._context.value))


def _mean(values: Collection[int]) -> float:
    return sum(values) / len(values) if values else 0.0
