"""When does a worker change to the other stage? When one is late and the other can spare it.

Pressure says how near a stage is to missing its target: 1 is at it.  A stage whose pressure is
above 1 gets a worker of the other, if the rest of that could carry its work with room to spare.
That must hold for some looks in a row, and after a change nothing is decided until its effect can
be seen: a balancer that follows each wave would keep the workers changing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from pdtasks.balance.sight import Pool, Sight
from pdtasks.naming import DECODE, PREFILL

#: Share of decode workers' places, and of their KV, above which answers wait for each other.
_FULL: Final = 0.9
#: Pressure that a pool may have with a worker less: below 1 by what a wave may bring.
_SPARE: Final = 0.7
#: Prompts for each prefill worker that are no backlog: one is computed, one lies ready.
_AT_WORK: Final = 2


@dataclass(frozen=True)
class Targets:
    """What callers are to get, and how it is followed."""

    ttft_s: float = 1.0  #: to the first token, median
    itl_s: float = 0.05  #: between tokens, median
    least_prefill: int = 1  #: workers that stay
    least_decode: int = 1
    looks: int = 3  #: in a row that must ask for the same change
    rest_s: float = 20.0  #: after a change, before the next is thought of

    def least_of(self, stage: str) -> int:
        """Workers that this stage keeps."""
        return self.least_prefill if stage == PREFILL else self.least_decode


@dataclass(frozen=True)
class Decision:
    """What is to be done now, and why."""

    why: str
    worker: str = ""  #: empty: nothing is to be done
    role: str = ""


class Decider:
    """Decides at each look, remembering the last ones."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._wish = ""  # the stage that should have one more
        self._looks = 0  # that have asked for it
        self._rests_until = -math.inf

    def decide(self, sight: Sight, now: float) -> Decision:
        """`now`: seconds, of a clock that never goes back."""
        told = self._told(sight)
        if not sight.is_settled:
            self._wish = ""
            return Decision(f"{told}: waiting for a worker that starts or changes")
        if now < self._rests_until:
            self._wish = ""
            return Decision(f"{told}: the last change is to show first")
        wish, why = self._wanted(sight)
        self._looks = self._looks + 1 if wish == self._wish else 1
        self._wish = wish
        if not wish:
            return Decision(f"{told}: {why}")
        if self._looks < self._targets.looks:
            return Decision(f"{told}: {why}, seen {self._looks} of {self._targets.looks} times")
        self._wish = ""
        self._rests_until = now + self._targets.rest_s
        giver = sight.decode if wish == PREFILL else sight.prefill
        worker = giver.least_busy.name
        return Decision(f"{told}: {why}: {worker} to {wish}", worker, wish)

    def _wanted(self, sight: Sight) -> tuple[str, str]:
        """The stage that should have one more, or none, and why."""
        targets = self._targets
        if not (sight.prefill or sight.decode):
            return "", "no worker that is ready serves one stage alone"
        prefill, decode = self.prefill_pressure(sight), self.decode_pressure(sight)
        if prefill > 1 and decode > 1:
            return "", "both stages miss their targets: more workers are needed"
        if prefill > 1:
            if len(sight.decode) <= targets.least_of(DECODE):
                return "", "first tokens are late, and decode has no worker to spare"
            if _after(decode, sight.decode) > _SPARE:
                return "", "first tokens are late, but decode would be too with one less"
            return PREFILL, "first tokens are late, and decode can spare one"
        if decode > 1:
            if len(sight.prefill) <= targets.least_of(PREFILL):
                return "", "answers are slow, and prefill has no worker to spare"
            if self._prefill_needs(sight):
                return "", "answers are slow, but prefill would be with one less"
            return DECODE, "answers are slow, and prefill can spare one"
        return "", "targets are met"

    def prefill_pressure(self, sight: Sight) -> float:
        """Of first tokens: those of the last seconds, and those that are waited for now."""
        return max(sight.ttft_s or 0.0, sight.waits_s) / self._targets.ttft_s

    def decode_pressure(self, sight: Sight) -> float:
        """Of answers under way: their pace, their places, their KV."""
        pace = (sight.itl_s or 0.0) / self._targets.itl_s
        return max(pace, sight.decode.busy / _FULL, sight.decode.kv_usage / _FULL)

    def _prefill_needs(self, sight: Sight) -> bool:
        """Would first tokens be late with one prefill worker less?"""
        # A latency does not grow with load until it does: what there is to do says it sooner.
        rest = len(sight.prefill) - 1
        has_backlog = sight.prompts > _AT_WORK * rest
        return has_backlog or _after(self.prefill_pressure(sight), sight.prefill) > _SPARE

    def _told(self, sight: Sight) -> str:
        targets = self._targets
        return (
            f"{len(sight.prefill)} prefill, {len(sight.decode)} decode; first token after "
            f"{_ms(sight.ttft_s)} (target {_ms(targets.ttft_s)}), longest wait "
            f"{_ms(sight.waits_s)}; a token each {_ms(sight.itl_s)} (target {_ms(targets.itl_s)}), "
            f"{sight.decode.busy:.0%} of places, {sight.decode.kv_usage:.0%} of KV"
        )


def _after(pressure: float, pool: Pool) -> float:
    """What `pressure` would be with one worker less to carry the same."""
    return pressure * len(pool) / (len(pool) - 1) if len(pool) > 1 else math.inf


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"
