"""Does what a worker runs beside its jobs survive surprises? Without engine, bus and broker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from vllm.v1.engine import FinishReason

from pdtasks import background
from pdtasks.engine.generation import Generation
from pdtasks.messages import StageReport, StepReply, WorkerStatus
from pdtasks.settings import Settings
from pdtasks.worker import service
from pdtasks.worker.service import Worker
from tests.unit.factories import a_request, an_output
from tests.waiting import wait_until


class StubBus:
    """Counts signs of life."""

    def __init__(self) -> None:
        self.told: list[bytes] = []

    def set(self, key: str, value: bytes, px: int) -> None:
        self.told.append(value)


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> StubBus:
    made = StubBus()
    monkeypatch.setattr(service, "connect", lambda settings: made)
    monkeypatch.setattr(service, "_ANNOUNCE_S", 0.01)
    monkeypatch.setattr(background, "_PAUSE_S", 0.05)
    return made


@pytest.fixture
def here(bus: StubBus) -> Iterator[Worker]:
    """A worker that has not been started."""
    settings = Settings(kv_urls=("valkey://127.0.0.1:1",), bus_url="valkey://nowhere")
    app = Celery("other", set_as_current=False)
    made = Worker(app, settings, name="w@h", role="decode")
    yield made
    made.enter("stopped")
    made._ended.set()
    made._discarder.close()
    made.results.close()
    made.background.close()


def test_presence_survives_a_surprise(
    here: Worker, bus: StubBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, surprises = here.status, [KeyError("surprise")]

    def once_odd() -> WorkerStatus:
        if surprises:
            raise surprises.pop()
        return status()

    monkeypatch.setattr(here, "status", once_odd)
    here.background.thread("presence", here._announce)

    wait_until(lambda: len(bus.told) > 2)


def test_the_watchdog_survives_a_surprise(
    here: Worker, bus: StubBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    looked_again = threading.Event()

    def once_odd(*_: object) -> str | None:
        looks.append(1)
        if len(looks) == 1:
            raise KeyError("surprise")
        looked_again.set()
        return None

    monkeypatch.setattr(here.liveness, "overdue", once_odd)
    here.background.thread("watchdog", here._watch)

    assert looked_again.wait(10)
    assert here.background.failures()["watchdog"] == 1


def test_a_worker_is_ready_only_while_its_loop_turns(
    here: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = type("StubEngine", (), {"num_running": 0, "num_held": 0, "kv_usage": 0.0})()
    config: Any = type("C", (), {"model_config": type("M", (), {"max_model_len": 9})})
    engine.config = config
    here.engine = engine
    here.enter("ready")

    here.liveness.beat(consumes=True)
    assert (here.status().state, here.status().reason) == ("ready", "")
    here.liveness.connecting("RabbitMQ closed the connection")
    assert (here.status().state, here.status().reason) == (
        "stalled",
        "RabbitMQ closed the connection",
    )
    here.liveness.beat(consumes=True)
    assert here.status().state == "ready"
    # What is wrong beside its jobs is told as well
    monkeypatch.setattr(here.background, "problems", lambda: ["discard has failed"])
    assert (here.status().state, here.status().reason) == ("ready", "discard has failed")


def test_a_report_that_fails_ends_its_own_request_alone(here: Worker) -> None:
    # Given two requests whose last outputs come in one step
    sent: list[StepReply] = []
    here._replies = type("StubReplies", (), {"put": lambda _, s, r: sent.append(r)})()
    loop_less: Any = Generation
    odd, good = (
        loop_less(
            request=a_request(name),
            request_id=name,
            reply_to="pd:reply:x",
            position=0,
            on_output=lambda generation, output: None,
            finished=StubFuture(),
        )
        for name in ("odd", "good")
    )

    def no_report() -> tuple[StageReport, ...]:
        raise KeyError("canary")

    here._final_reports = {odd: no_report, good: lambda: ()}

    here._publish_step(
        [
            (odd, 0, an_output([1], "odd", FinishReason.STOP)),
            (good, 0, an_output([2], "good", FinishReason.STOP)),
        ],
        1.0,
    )

    (reply,) = sent
    assert list(reply.reports) == ["good"]
    assert odd.finished.error is not None
    assert good.finished.error is None


class StubFuture:
    """A future without a loop."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def done(self) -> bool:
        return self.error is not None

    def set_exception(self, error: Exception) -> None:
        self.error = error
