"""What does the balancer see? Workers and latencies, as one API process tells them of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pdtasks.naming import DECODE, PREFILL, stage_and_model
from pdtasks.overview import Overview, Slot, WorkerView

#: Latencies of so many seconds count: enough for a median, few enough to see a change.
_LATELY_S: Final = 15.0


@dataclass(frozen=True)
class Pool:
    """Workers of one stage alone that take jobs."""

    workers: tuple[WorkerView, ...] = ()

    def __len__(self) -> int:
        return len(self.workers)

    @property
    def busy(self) -> float:
        """Share of their places that are taken, 0 to 1."""
        slots = sum(worker.slots for worker in self.workers)
        return sum(worker.active for worker in self.workers) / slots if slots else 0.0

    @property
    def kv_usage(self) -> float:
        """Mean share of their KV blocks that requests hold, 0 to 1."""
        return sum(w.kv_usage for w in self.workers) / len(self) if self.workers else 0.0

    @property
    def least_busy(self) -> WorkerView:
        """The one whose change costs least. There must be one."""
        return min(self.workers, key=lambda worker: (worker.active, worker.name))


@dataclass(frozen=True)
class Sight:
    """One look. Seconds; None: no request has told lately."""

    prefill: Pool = Pool()
    decode: Pool = Pool()
    is_settled: bool = True  #: no worker starts, or changes its role
    waits_s: float = 0.0  #: the longest wait now for a first token
    prompts: int = 0  #: requests without a first token
    ttft_s: float | None = None  #: medians of the last seconds
    itl_s: float | None = None


def sight_of(found: Overview) -> Sight:
    """What `found`, of its API's model alone, shows."""
    ours = [worker for worker in found.workers if worker.model == found.api.model]
    ready = [worker for worker in ours if worker.state == "ready"]
    waits = [
        queue.oldest_s
        for queue in found.queues
        if stage_and_model(queue.name)[0] == PREFILL and queue.oldest_s is not None
    ]
    slots = [slot for slot in found.window.slots if found.at - slot.at <= _LATELY_S]
    return Sight(
        prefill=Pool(tuple(worker for worker in ready if worker.role == PREFILL)),
        decode=Pool(tuple(worker for worker in ready if worker.role == DECODE)),
        is_settled=not any(worker.state in ("starting", "changing") for worker in ours),
        waits_s=max(waits, default=0.0),
        prompts=found.in_flight.in_line + found.in_flight.prefill,
        ttft_s=_mean(slots, "ttft_p50_s"),
        itl_s=_mean(slots, "itl_p50_s"),
    )


def _mean(slots: Sequence[Slot], name: str) -> float | None:
    """Of the medians, by how many requests each is of."""
    told = [(getattr(s, name), max(1, s.requests)) for s in slots if getattr(s, name) is not None]
    weights = sum(weight for _, weight in told)
    return sum(value * weight for value, weight in told) / weights if told else None
