"""Does the command say what was found, and end with the right code?"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pdtasks.bench.chaos import command
from pdtasks.bench.chaos.run import Fault, Found, Plan
from pdtasks.bench.chaos.schedule import REAL_ENGINE_ONLY, Kind
from pdtasks.bench.chaos.tally import Answer, Event, Saw, Story, count
from pdtasks.cli import main

FAULT = Fault(3.0, Kind.KILL_DECODE, "decode1", until_s=3.1, longest_wait_s=0.6)
TOKENS = Event(1.0, Saw.TOKENS, (10, 11), "ab")
FINISHED = Event(1.0, Saw.FINISHED, detail="length")


def story(*events: Event) -> Story:
    return Story("chaos-stream-7", "stream", Answer((10, 11), "ab"), 0.5, "api1", list(events))


def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *stories: Story
) -> tuple[int, str, dict[str, Any], Path]:
    """Exit code, output, JSON, and the folder of the run."""
    homes: list[Path] = []

    def run_chaos(plan: Plan, home: Path, _console: object) -> Found:
        homes.append(home)
        return Found(count(stories), [FAULT])

    monkeypatch.setattr(command, "run_chaos", run_chaos)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(tmp_path / "home"))
    (tmp_path / "home" / "logs").mkdir(parents=True)
    file = tmp_path / "chaos.json"
    done = CliRunner().invoke(main, ["bench", "chaos", "--json", str(file)])
    return done.exit_code, done.output, json.loads(file.read_text()), homes[0]


def test_a_promise_that_was_kept_ends_with_0_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, output, figures, home = run(monkeypatch, tmp_path, story(TOKENS, FINISHED))

    assert code == 0
    assert "engines: stub; faults: 1; accepted: 1; right: 1" in output
    assert figures == {
        "accepted": 1,
        "right": 1,
        "clear_error": 0,
        "lost": 0,
        "duplicated": 0,
        "wrong": 0,
        "faults": [
            {"at_s": 3.0, "kind": "kill-decode", "target": "decode1", "longest_wait_s": 0.6}
        ],
    }
    assert not home.exists()


@pytest.mark.parametrize("seen", [(TOKENS,), (TOKENS, FINISHED, FINISHED), (FINISHED, TOKENS)])
def test_a_promise_that_was_broken_ends_with_1_says_how_and_keeps_the_logs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: tuple[Event, ...]
) -> None:
    code, output, figures, home = run(monkeypatch, tmp_path, story(*seen))

    assert code == 1
    assert "chaos-stream-7" in output
    assert "0.50 s asked of api1" in output
    assert figures["lost"] + figures["duplicated"] + figures["wrong"] == 1
    assert (home / "logs").is_dir()


def test_stub_engines_get_no_fault_that_only_a_real_one_can_have() -> None:
    stub, real = (command.make_plan(10, 1, engine) for engine in ("stub", "real"))

    assert {f.kind for f in stub.faults} == set(Kind) - REAL_ENGINE_ONLY
    assert {f.kind for f in real.faults} == set(Kind)
    assert (stub.seconds, real.seconds) == (600, 600)
