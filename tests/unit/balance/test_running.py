"""What does a balancer do with what it decides? API and bus are stubs."""

from __future__ import annotations

import io
from typing import Any

import pytest
import valkey

from pdtasks.balance import running
from pdtasks.balance.deciding import Decision, Targets
from pdtasks.balance.running import Balancer
from pdtasks.cluster.console import Console
from pdtasks.messages import WorkerStatus
from pdtasks.terminal.asking import NoAnswer

DECODE1, DECODE2 = (
    WorkerStatus(name=f"decode{n}@h", role="decode", host="h", pid=n, state="ready") for n in (1, 2)
)


class World:
    """Everything around a balancer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 7  # of the lease; 0: another one has it
        self.known = [DECODE1, DECODE2]
        self.ordered: list[tuple[str, str, int]] = []
        self.decision = Decision("it is late: decode2@h to prefill", "decode2@h", "prefill")
        self.answers = True
        monkeypatch.setattr(running, "Lease", lambda *_: self)
        monkeypatch.setattr(running, "Decider", lambda _: self)
        monkeypatch.setattr(running, "sight_of", lambda found: found)
        monkeypatch.setattr(running, "read_workers", lambda _: self.known)
        monkeypatch.setattr(
            running, "order_role", lambda _, w, role, n: self.ordered.append((w.name, role, n))
        )

    def hold(self) -> int:
        return self.number

    def decide(self, *_: Any) -> Decision:
        return self.decision

    def overview(self, _limit: int, model: str) -> Any:
        assert model == "m"
        if not self.answers:
            raise NoAnswer("no API answers")
        return None

    def balancer(self, *, dry_run: bool = False) -> Balancer:
        stub: Any = self
        return Balancer(stub, stub, Targets(), model="m", every_s=1.0, dry_run=dry_run)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_what_is_decided_is_ordered_under_the_leases_number(world: World) -> None:
    world.known = [DECODE1, DECODE2, WorkerStatus(
        name="prefill1@h", role="prefill", host="h", pid=3, state="ready"
    )]  # fmt: skip
    assert world.balancer().step() == ("it is late: decode2@h to prefill", True)
    assert world.ordered == [("decode2@h", "prefill", 7)]


def test_who_has_no_lease_does_not_even_look(world: World) -> None:
    world.number, world.answers = 0, False
    assert world.balancer().step() == ("another balancer is at work: this one waits", False)


def test_a_dry_run_says_so_and_does_nothing_beside_one_that_acts(world: World) -> None:
    world.number = 0
    said, acts = world.balancer(dry_run=True).step()
    assert said == "it is late: decode2@h to prefill (dry run: nothing is done)"
    assert acts
    assert world.ordered == []


def test_a_worker_that_has_gone_or_must_not_change_is_left_alone(world: World) -> None:
    world.known = [DECODE1]
    assert world.balancer().step()[0].endswith(", which has gone")
    world.known = [DECODE2]
    assert world.balancer().step() == (
        "it is late: decode2@h to prefill, but by now its stage has no worker to spare",
        False,
    )
    assert world.ordered == []


def test_what_does_not_answer_is_told_and_nobody_changes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    world.answers = False
    running._run(world.balancer(), Console(out), 1.0, once=True)
    assert "no API answers" in out.getvalue()

    def away() -> int:
        raise valkey.ConnectionError("canary")

    monkeypatch.setattr(world, "hold", away)
    running._run(world.balancer(), Console(out), 1.0, once=True)
    assert "bus: ConnectionError" in out.getvalue()
    assert "canary" not in out.getvalue()
    assert world.ordered == []
