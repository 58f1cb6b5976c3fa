"""Does what a worker runs beside its jobs survive surprises? Without engine, bus and broker."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine import FinishReason

from pdtasks import background
from pdtasks.background import Background
from pdtasks.drained import Drained
from pdtasks.engine.generation import Generation, State
from pdtasks.errors import RequestAborted
from pdtasks.messages import DrainOrder, RoleOrder, StageReport, StepReply, WorkerStatus
from pdtasks.running_stack import identify
from pdtasks.settings import Settings
from pdtasks.worker import aborted, announcing, liveness, name, service
from pdtasks.worker.aborted import AbortMemory
from pdtasks.worker.announcing import Figures, Presence
from pdtasks.worker.answering import Answers
from pdtasks.worker.liveness import Liveness
from tests.unit.factories import a_request, an_output
from tests.waiting import wait_until


class StubBus:
    """Counts signs of life."""

    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.drained: list[bool] = []
        self.order: bytes | None = None  # to drain
        self.roles: list[str] = []
        self.role_order: bytes | None = None

    def has_told_more_than(self, number: int) -> bool:
        return len(self.told) > number

    def get(self, key: str) -> bytes | None:
        """What is under the two keys that are read."""
        return {"pd:order:drain:w@h": self.order, "pd:order:role:w@h": self.role_order}[key]

    def leave(self, status: WorkerStatus, ttl_ms: int, is_gone: Any) -> None:
        self.told.append(status.to_wire())


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> StubBus:
    made = StubBus()
    monkeypatch.setattr(announcing, "connect", lambda settings: made)
    monkeypatch.setattr(name, "leave_status", StubBus.leave)
    monkeypatch.setattr(announcing, "_ANNOUNCE_S", 0.01)
    monkeypatch.setattr(background, "_PAUSE_S", 0.05)
    return made


@pytest.fixture
def beside() -> Background:
    return Background()


@pytest.fixture
def alive() -> Liveness:
    return Liveness()


@pytest.fixture
def presence(bus: StubBus, beside: Background, alive: Liveness) -> Iterator[Presence]:
    """Of a worker that starts."""
    made = Presence(
        Settings(bus_url="valkey://nowhere"),
        name="w@h",
        slots=8,
        role="decode",
        liveness=alive,
        background=beside,
        on_name_taken=pytest.fail,
        on_drain=lambda: bus.drained.append(True),
        on_role=bus.roles.append,
    )
    made.start()
    yield made
    made.enter("stopped")
    made.wait_until_silent()


def test_a_worker_that_is_asked_to_drain_does_so_once(presence: Presence, bus: StubBus) -> None:
    other = (*presence.status().process[:3], 1)
    for order in (b"canary", DrainOrder(process=other).to_wire()):
        bus.order = order
        told = len(bus.told)
        wait_until(partial(bus.has_told_more_than, told + 2))
        assert bus.drained == [], "meant for another process, or no order"

    bus.order = DrainOrder(process=presence.status().process).to_wire()
    wait_until(lambda: bus.drained)
    told = len(bus.told)
    wait_until(lambda: len(bus.told) > told + 2)
    assert bus.drained == [True]


def test_a_worker_hears_its_role_when_it_is_ready_and_from_nobody_elses_order(
    presence: Presence, bus: StubBus
) -> None:
    process = presence.status().process
    bus.role_order = RoleOrder(process=process, role="both").to_wire()
    told = len(bus.told)
    wait_until(partial(bus.has_told_more_than, told + 2))
    assert bus.roles == [], "it has no engine yet"

    presence.enter("ready")
    wait_until(lambda: bus.roles)
    assert set(bus.roles) == {"both"}

    for order in (b"canary", RoleOrder(process=(*process[:3], 1), role="prefill").to_wire()):
        bus.role_order = order
        told = len(bus.told)
        wait_until(partial(bus.has_told_more_than, told + 2))
    assert set(bus.roles) == {"both"}


def test_an_order_under_a_lease_that_was_lost_is_not_obeyed_but_a_persons_is(
    presence: Presence, bus: StubBus
) -> None:
    presence.enter("ready")
    process = presence.status().process

    def obeys(role: str, number: int) -> bool:
        bus.roles.clear()
        bus.role_order = RoleOrder(process=process, role=role, number=number).to_wire()
        told = len(bus.told)
        wait_until(partial(bus.has_told_more_than, told + 2))
        return role in bus.roles

    assert obeys("both", 8)
    assert not obeys("prefill", 7)
    assert obeys("prefill", 0)
    assert obeys("decode", 8)


def test_a_worker_says_that_it_changes_until_it_serves(presence: Presence) -> None:
    presence.enter("ready")
    presence.serve("prefill", becomes="prefill")
    changing = presence.status()
    assert (changing.role, changing.state) == ("prefill", "changing")
    assert changing.reason == "ends what it has begun, then serves prefill"

    presence.serve("prefill")
    assert presence.status().state == "ready"


@pytest.mark.parametrize("is_own", [True, False])
def test_a_worker_that_drains_stays_away_where_a_stack_runs_it(
    is_own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *told: signals.append(told))
    identity = identify(os.getpid())
    assert identity is not None
    member = {
        "name": "decode1",
        "role": "decode",
        "pid": os.getpid() if is_own else 1,
        "pid_started": identity.started,
        "log": "",
    }
    stack = {"version": 1, "pid": 1, "pid_started": 1, "services": [member], "helpers": []}
    (tmp_path / "stack.json").write_text(json.dumps(stack | {"folders": []}))

    service._drain(tmp_path)

    assert ("decode1" in Drained(tmp_path)) is is_own
    assert signals == [(os.getpid(), signal.SIGTERM)]


def test_presence_survives_a_surprise(
    presence: Presence, bus: StubBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    surprises: list[Exception] = [KeyError("surprise")]
    status = presence.status

    def once_odd() -> WorkerStatus:
        if surprises:
            raise surprises.pop()
        return status()

    monkeypatch.setattr(presence, "status", once_odd)
    wait_until(lambda: not surprises)
    told = len(bus.told)

    wait_until(lambda: len(bus.told) > told + 2)


def test_the_watchdog_survives_a_surprise(
    beside: Background, alive: Liveness, bus: StubBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    looked_again, ended = threading.Event(), threading.Event()

    def once_odd(*_: object) -> str | None:
        looks.append(1)
        if len(looks) == 1:
            raise KeyError("surprise")
        looked_again.set()
        return None

    monkeypatch.setattr(alive, "overdue", once_odd)
    watchdog = beside.thread("watchdog", lambda: liveness.watch(alive, 30, 30, ended))

    assert looked_again.wait(10)
    assert beside.failures()["watchdog"] == 1
    ended.set()
    watchdog.join(10)


def test_a_worker_is_ready_only_while_its_loop_turns(
    presence: Presence, alive: Liveness, beside: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> tuple[str, str]:
        status = presence.status()
        return status.state, status.reason

    assert said() == ("starting", "")
    presence.enter("ready")
    alive.beat(consumes=True)
    assert said() == ("ready", "")
    alive.connecting("RabbitMQ closed the connection")
    assert said() == ("stalled", "RabbitMQ closed the connection")
    alive.beat(consumes=True)
    assert said() == ("ready", "")
    # What is wrong beside its jobs is told as well
    monkeypatch.setattr(beside, "problems", lambda: ["discard has failed"])
    assert said() == ("ready", "discard has failed")


def test_how_much_there_is_to_do_is_told_once_it_is_known(presence: Presence) -> None:
    presence.enter("ready")
    assert presence.status().active == 0

    presence.observe(lambda: Figures(active=3, held=4, kv_usage=0.5, max_model_len=9))

    status = presence.status()
    assert (status.active, status.held, status.kv_usage, status.max_model_len) == (3, 4, 0.5, 9)


def test_what_an_idle_worker_holds_is_told_once(
    presence: Presence, bus: StubBus, caplog: pytest.LogCaptureFixture
) -> None:
    presence.observe(lambda: Figures(stages=1, held=2))
    presence.enter("ready")
    told = len(bus.told)
    wait_until(lambda: len(bus.told) > told + 5)
    assert "still held" not in caplog.text, "it is at work"

    presence.observe(lambda: Figures(held=2))
    wait_until(lambda: "2 requests that have ended are still held" in caplog.text)
    told = len(bus.told)
    wait_until(lambda: len(bus.told) > told + 5)

    assert caplog.text.count("still held") == 1


def test_the_oldest_aborts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aborted, "_REMEMBERED", 2)
    memory = AbortMemory()

    memory.remember(["a", "b", "c"])

    memory.require_wanted("a")
    assert memory.has_all(["b", "c"])
    assert not memory.has_all(["a", "b"])
    for request_id in ("b", "c"):
        with pytest.raises(RequestAborted):
            memory.require_wanted(request_id)


def test_a_report_that_fails_ends_its_own_request_alone() -> None:
    # Given two requests whose last outputs come in one step
    sent: list[StepReply] = []
    replies: Any = type("StubReplies", (), {"put": lambda _, s, r: sent.append(r)})()
    answers = Answers(replies, worker="w@h")
    loop_less: Any = Generation
    odd, good = (
        loop_less(
            request=a_request(name),
            request_id=name,
            reply_to="pd:reply:x",
            position=0,
            state=State.ANSWERED,
            finished=StubFuture(),
        )
        for name in ("odd", "good")
    )

    def no_report() -> tuple[StageReport, ...]:
        raise KeyError("canary")

    answers.begin(odd, no_report)
    answers.begin(good, lambda: ())

    answers.publish_step(
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
