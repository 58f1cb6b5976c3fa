"""Are workers restarted in turn, and drained? With children that only sleep, and no bus."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdtasks.cluster import workers
from pdtasks.cluster.console import Console
from pdtasks.cluster.stack import write_stack
from pdtasks.cluster.status import Row, Status
from pdtasks.cluster.workers import drain_workers, restart_workers
from pdtasks.drained import Drained
from pdtasks.errors import PdtasksError
from pdtasks.running_stack import Member, Stack, identify
from pdtasks.settings import Settings

_HERE = socket.gethostname()


class Bench:
    """A stack of workers that end when they are asked to; a successor is ready soon after."""

    def __init__(self, home: Path, roles: dict[str, str]) -> None:
        self.settings = Settings(home=home)
        self.output = io.StringIO()
        self.comes_back = True
        self.elsewhere: dict[str, str] = {}  #: workers of another host, as in `roles`
        self.order: list[str] = []  #: in which they ended
        self._back: list[str] = []
        self._roles = roles
        self.children = {
            name: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            for name in roles
        }
        own = identify(os.getpid())
        assert own is not None
        members = []
        for name, role in roles.items():
            found = identify(self.children[name].pid)
            assert found is not None
            members.append(Member(name, role, found.pid, found.started, "/log"))
        write_stack(home, Stack(own.pid, own.started, "ready", services=tuple(members)))

    def ask(self, _: Settings) -> Status:
        ended = [name for name, child in self.children.items() if child.poll() is not None]
        self.order += [name for name in ended if name not in self.order]
        away = [name for name in ended if name not in self._back]
        assert len(away) <= 1, "one after the other"
        if self.comes_back:
            self._back += away
        return Status(
            workers=tuple(
                Row(
                    f"{name}@{_HERE}",
                    role,
                    self.children[name].pid + 10**6 * (name in ended),
                    "ready",
                )
                for name, role in self._roles.items()
                if name not in ended or name in self._back
            )
            # Of another host
            + tuple(Row(f"{name}@far", role, 1, "ready") for name, role in self.elsewhere.items())
        )

    def run(self, *names: str) -> int:
        return restart_workers(self.settings, names, Console(self.output), ask=self.ask)

    def drain(self, *names: str) -> int:
        reapers = [threading.Thread(target=self.children[name].wait) for name in names]
        for reaper in reapers:  # as the supervisor does: else they are there as zombies
            reaper.start()
        return drain_workers(self.settings, names, Console(self.output), ask=self.ask)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    roles = {"prefill1": "prefill", "decode1": "decode", "decode2": "decode"}
    made = Bench(tmp_path, roles)
    yield made
    for child in made.children.values():
        child.kill()
        child.wait()


def test_all_workers_are_restarted_one_after_the_other(bench: Bench) -> None:
    assert bench.run() == 0

    assert bench.order == ["prefill1", "decode1", "decode2"]
    told = bench.output.getvalue()
    assert told.count("is back after") == 3
    assert told.count("is the only") == 1
    assert "prefill1 is the only prefill worker" in told


def test_named_workers_are_restarted_alone(bench: Bench) -> None:
    assert bench.run("decode2") == 0

    assert bench.order == ["decode2"]


def test_a_worker_of_another_host_is_not_taken_for_one_that_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_DEADLINE_S", 0.3)
    bench.elsewhere = {"decode1": "decode"}
    bench.comes_back = False

    assert bench.run("decode1") == 1


def test_the_next_ones_stay_when_one_does_not_come_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_DEADLINE_S", 0.3)
    bench.comes_back = False

    assert bench.run("decode1", "decode2") == 1

    assert bench.children["decode2"].poll() is None
    assert "decode1 is not back" in bench.output.getvalue()


def test_a_name_that_is_not_there_is_an_error(bench: Bench) -> None:
    with pytest.raises(PdtasksError, match="no worker is called 'decode7', only prefill1"):
        bench.run("decode7")

    assert bench.order == []


def test_without_a_stack_it_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(PdtasksError, match="pdtasks up"):
        restart_workers(Settings(home=tmp_path), (), Console(io.StringIO()))


def test_a_drained_worker_stays_away_until_it_is_restarted(bench: Bench) -> None:
    drained = Drained(bench.settings.home)

    assert bench.drain("decode1") == 0

    # (`poll` says nothing while the thread that waits for it has not noted the status.)
    assert identify(bench.children["decode1"].pid) is None
    assert ("decode1" in drained, "decode2" in drained) == (True, False)
    told = bench.output.getvalue()
    assert "stays away until `pdtasks restart decode1`" in told
    assert "is the only" not in told

    assert bench.run("decode1") == 0
    assert "decode1" not in drained


def test_who_drains_the_last_worker_of_a_stage_is_told_what_that_means(bench: Bench) -> None:
    assert bench.drain("prefill1") == 0
    told = bench.output.getvalue()
    assert "prefill1 is the only prefill worker" in told
    assert "refused until `pdtasks restart prefill1`" in told


def test_a_worker_that_does_not_stop_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_GRACE_S", 0.3)
    bench.settings = bench.settings.model_copy(update={"drain_timeout_s": 0.0})
    monkeypatch.setattr(os, "kill", lambda pid, _: None)

    assert bench.drain("decode1") == 1

    assert "decode1 still runs" in bench.output.getvalue()


def test_a_stack_begins_with_all_its_workers(tmp_path: Path) -> None:
    drained = Drained(tmp_path)
    drained.clear()  # there is nothing yet
    drained.add("decode1")
    drained.clear()
    assert "decode1" not in drained
