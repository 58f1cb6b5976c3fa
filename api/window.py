"""How fast was it in the last minutes? Latencies and counts in slots of a few seconds.

Each token of each answer passes here, so that a slot adds and nothing else; what is asked now and
then is worked out when it is asked.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log2
from typing import Any, Final

from pdtasks.bus.apis import SlotCounts as ToldCounts
from pdtasks.bus.apis import WindowCounts
from pdtasks.messages import StageReport
from pdtasks.naming import PREFILL
from pdtasks.overview import KvFlow, Quantiles, Slot, Window

SLOT_S: Final = 5.0
NUM_SLOTS: Final = 60
#: Durations are counted in classes whose bounds have this ratio: a quantile is within 5 %.
_CLASSES_PER_OCTAVE: Final = 8
_SHORTEST_S: Final = 1e-6
_SHORTEST: Final = log2(_SHORTEST_S)


class Durations:
    """How many were how long."""

    __slots__ = ("counts",)

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int, counts or {})  # by class

    def add(self, seconds: float) -> None:
        """One more."""
        octaves = log2(seconds) if seconds > _SHORTEST_S else _SHORTEST
        self.counts[int((octaves - _SHORTEST) * _CLASSES_PER_OCTAVE)] += 1

    def quantile(self, q: float) -> float | None:
        """In seconds; None when there are none."""
        counts = self.counts
        left = q * sum(counts.values())
        for kind in sorted(counts):
            left -= counts[kind]
            if left <= 0:
                return float(2 ** (_SHORTEST + (kind + 0.5) / _CLASSES_PER_OCTAVE))
        return None

    @staticmethod
    def quantiles(several: Iterable[Mapping[int, int]]) -> Quantiles:
        """Of all in `several`, counts by class."""
        together = Durations()
        for counts in several:
            for kind, count in counts.items():
                together.counts[kind] += count
        return Quantiles(
            count=sum(together.counts.values()),
            p50_s=together.quantile(0.5),
            p95_s=together.quantile(0.95),
            p99_s=together.quantile(0.99),
        )


class SlotCounts:
    """What happened in one slot."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ends_at = (number + 1) * SLOT_S  # monotonic
        self.tokens = 0
        self.ended = 0
        self.failed = 0
        self.ttft = Durations()
        self.gap = Durations()
        self.itl = Durations()
        self.end_to_end = Durations()
        self.kv: Counter[str] = Counter()  # by the fields of `KvFlow`


class Recently:
    """The last `NUM_SLOTS` slots. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._slots: deque[SlotCounts] = deque([SlotCounts(self._number(self._began))])

    def slot(self, now: float) -> SlotCounts:
        """The one to count in. `now`: monotonic seconds."""
        last = self._slots[-1]
        if now < last.ends_at:
            return last
        last = SlotCounts(self._number(now))
        self._slots.append(last)
        self._forget_old(last.number)
        return last

    def took(self, report: StageReport, before: StageReport | None) -> None:
        """A stage says what it did; `before`: what it had said of the same already."""
        new, old = _flow(report), _flow(before) if before else Counter[str]()
        new.subtract(old)
        self.slot(self._clock()).kv.update(new)

    def window(self) -> Window:
        """All of it."""
        return window_of([self.counts()])

    def counts(self) -> WindowCounts:
        """All of it, for others to add theirs. Slots in which nothing was are not there."""
        now = self._clock()
        newest = self.slot(now).number
        first = max(newest - NUM_SLOTS + 1, self._number(self._began))
        # Slots begin with this process's clock: to others' they are the nearest of wall time.
        shift = round((time.time() - now) / SLOT_S)
        slots = [_told(slot, slot.number + shift) for slot in self._slots]
        if slots[0].number > first + shift:
            slots.insert(0, ToldCounts(first + shift))  # it says since when there was nothing
        return WindowCounts(max(now - max(first * SLOT_S, self._began), 0.001), slots)

    @staticmethod
    def _number(now: float) -> int:
        return int(now // SLOT_S)

    def _forget_old(self, newest: int) -> None:
        while self._slots[0].number <= newest - NUM_SLOTS:
            self._slots.popleft()


def window_of(several: Sequence[WindowCounts]) -> Window:
    """Of all processes in `several` together; at least one."""
    by_number: defaultdict[int, list[ToldCounts]] = defaultdict(list)
    for counts in several:
        for slot in counts.slots:
            by_number[slot.number].append(slot)
    last = max(by_number)
    first = max(min(by_number), last - NUM_SLOTS + 1)
    slots = [_together(by_number[n], n) for n in range(first, last + 1)]
    seconds = max(counts.seconds for counts in several)
    tokens = sum(slot.tokens for slot in slots)
    kv: Counter[str] = Counter()
    for slot in slots:
        kv.update(slot.kv)
    return Window(
        seconds=seconds,
        slot_s=SLOT_S,
        requests=sum(slot.ended for slot in slots),
        failed=sum(slot.failed for slot in slots),
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        ttft=Durations.quantiles(slot.ttft for slot in slots),
        gap=Durations.quantiles(slot.gap for slot in slots),
        itl=Durations.quantiles(slot.itl for slot in slots),
        end_to_end=Durations.quantiles(slot.end_to_end for slot in slots),
        kv=KvFlow(**{name: max(0, count) for name, count in kv.items()}),
        slots=tuple(map(_shown, slots)),
    )


def _told(slot: SlotCounts, number: int) -> ToldCounts:
    return ToldCounts(
        number=number,
        tokens=slot.tokens,
        ended=slot.ended,
        failed=slot.failed,
        ttft=dict(slot.ttft.counts),
        gap=dict(slot.gap.counts),
        itl=dict(slot.itl.counts),
        end_to_end=dict(slot.end_to_end.counts),
        kv=dict(slot.kv),
    )


def _together(several: Sequence[ToldCounts], number: int) -> ToldCounts:
    if len(several) == 1:
        return several[0]

    def summed(name: str) -> dict[Any, int]:
        total: Counter[Any] = Counter()
        for one in several:
            total.update(getattr(one, name))
        return dict(total)

    return ToldCounts(
        number=number,
        tokens=sum(one.tokens for one in several),
        ended=sum(one.ended for one in several),
        failed=sum(one.failed for one in several),
        **{name: summed(name) for name in ("ttft", "gap", "itl", "end_to_end", "kv")},
    )


def _shown(slot: ToldCounts) -> Slot:
    kv = slot.kv
    return Slot(
        at=slot.number * SLOT_S,
        requests=slot.ended,
        tokens=slot.tokens,
        ttft_p50_s=Durations(slot.ttft).quantile(0.5),
        gap_p50_s=Durations(slot.gap).quantile(0.5),
        itl_p50_s=Durations(slot.itl).quantile(0.5),
        kv_bytes=max(0, kv.get("bytes_written", 0) + kv.get("bytes_loaded", 0)),
    )


def _flow(report: StageReport) -> Counter[str]:
    flow = Counter(
        bytes_written=report.kv_bytes_written,
        bytes_loaded=report.kv_bytes_loaded,
        blocks_recomputed=report.kv_blocks_recomputed,
    )
    if report.stage == PREFILL or report.is_whole:
        flow["prefix_blocks_loaded"] = report.kv_blocks_loaded
        flow["prompt_tokens"] = report.prompt_tokens
        flow["cached_tokens"] = report.cached_tokens
    else:
        flow["blocks_loaded"] = report.kv_blocks_loaded
    return flow
