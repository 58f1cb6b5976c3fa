"""What is counted of the stages that a worker runs? Once for each request, never for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from pdtasks.messages import WORKER_STATES, StageReport
from pdtasks.naming import DECODE, PREFILL

#: Seconds: prompts take milliseconds, long answers minutes.
_SECONDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600),
)

_ENDED = Counter(
    "pdtasks_stage_requests", "Runs of a stage that have ended, by how", ["stage", "outcome"]
)
_STAGE_SECONDS = Histogram(
    "pdtasks_stage_seconds",
    "From taking a job to its last output, of runs that were done",
    ["stage"],
    buckets=_SECONDS,
)
_QUEUE_SECONDS = Histogram(
    "pdtasks_stage_queue_seconds",
    "Wait for the stage to begin, of runs that were done (hosts' clocks compared)",
    ["stage"],
    buckets=_SECONDS,
)
_HAND_OVER = Histogram(
    "pdtasks_handover_seconds",
    "Parts of the way from prefill to decode; they overlap with each other and with compute",
    ["part"],
    buckets=_SECONDS,
)
_RECOMPUTES = Counter(
    "pdtasks_kv_recomputes",
    "Requests that computed KV again which was there before, by why",
    ["stage", "reason"],
)
_RECOMPUTED = Counter(
    "pdtasks_kv_recomputed_blocks", "KV blocks that they computed again", ["stage", "reason"]
)
_AGAIN = Counter(
    "pdtasks_redeliveries", "Jobs that RabbitMQ delivered to this worker again", ["stage"]
)
_DEAD = Counter("pdtasks_dead_letters", "Jobs that were given up and answered for here")
_STALLS = Counter("pdtasks_worker_stalls", "Times that this worker was found to take no jobs")


def redelivered(stage: str) -> None:
    """A job came that had been delivered before."""
    _AGAIN.labels(stage).inc()


def dead_letter() -> None:
    """A job that no worker survived was answered for."""
    _DEAD.inc()


def stalled() -> None:
    """The worker was found to take no jobs."""
    _STALLS.inc()


def published(seconds: float) -> None:
    """RabbitMQ has confirmed the next stage's job after `seconds`."""
    _HAND_OVER.labels("publish").observe(seconds)


def ended(stage: str, outcome: str, report: StageReport | None, why_recomputed: str) -> None:
    """A run of `stage` has ended.

    Args:
        report: of a run that was done.
        why_recomputed: if it has computed KV again.
    """
    _ENDED.labels(stage, outcome).inc()
    if report is None:
        return
    _STAGE_SECONDS.labels(stage).observe(report.seconds)
    _QUEUE_SECONDS.labels(stage).observe(report.queue_s)
    if report.kv_blocks_recomputed:
        _RECOMPUTES.labels(stage, why_recomputed).inc()
        _RECOMPUTED.labels(stage, why_recomputed).inc(report.kv_blocks_recomputed)
    if stage == PREFILL and report.kv_blocks_written:
        _HAND_OVER.labels("save").observe(report.kv_seconds)
    if stage == DECODE and not report.is_whole:
        _HAND_OVER.labels("queue").observe(report.queue_s)
        if report.kv_blocks_loaded:
            _HAND_OVER.labels("load").observe(report.kv_seconds)


@dataclass(frozen=True)
class Look:
    """What a worker is at now."""

    state: str  #: one of `WORKER_STATES`
    slots: int  #: jobs that it takes at once
    stages: int  #: tasks at work
    overdue: int  #: of those, whose deadline has passed for long: a place that is lost
    unsent_replies: int  #: that the bus has not taken yet


class WorkerFigures:
    """What a worker is at, looked at when somebody asks."""

    def __init__(self, look: Callable[[], Look]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        """For a registry of `prometheus_client`."""
        now = self._look()
        state = GaugeMetricFamily(
            "pdtasks_worker_state", "1 for the state that the worker is in", labels=["state"]
        )
        for name in WORKER_STATES:
            state.add_metric([name], name == now.state)
        yield state
        yield GaugeMetricFamily(
            "pdtasks_worker_slots", "Jobs that it takes at once", value=now.slots
        )
        yield GaugeMetricFamily("pdtasks_worker_stages", "Jobs under way", value=now.stages)
        yield GaugeMetricFamily(
            "pdtasks_worker_overdue_stages",
            "Jobs under way whose deadline has passed for long: each keeps a place",
            value=now.overdue,
        )
        yield GaugeMetricFamily(
            "pdtasks_worker_unsent_replies",
            "Messages that the bus has not taken yet",
            value=now.unsent_replies,
        )
