"""What vLLM's own app answers over one ordinary engine, for comparison with the stack's answers."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.acceptance.nursery import Forked, Nursery
from tests.acceptance.parameter_cases import FLAGS, REASONING, Case, in_company
from tests.acceptance.running_stack import MODEL
from tests.waiting import wait_until

#: Seconds that an answer may take, with all that are asked for before it.
TIMEOUT_S = 400

#: Names, times and counts of a process's own; all else of an answer has to be equal.
_OWN = {
    *("created", "created_at", "completed_at", "system_fingerprint", "sequence_number"),
    *("item_id", "call_id"),
}
#: Text that comes in pieces.
_PIECES = {"text", "content", "reasoning", "arguments", "partial_json", "delta", "thinking"}


class Reference:
    """The answers to some cases, while they are being made."""

    def __init__(self, program: Forked, folder: Path, names: list[str]) -> None:
        self._program = program
        self._log = folder / "log"
        self._answers = folder / "answers"
        self._places = {name: place for place, name in enumerate(names)}

    def answer(self, name: str) -> tuple[int, str]:
        """Status and text; waits for them."""
        place = self._places[name]

        def line() -> str | None:
            lines = self._answers.read_text().splitlines(keepends=True)
            if len(lines) > place and lines[place].endswith("\n"):
                return lines[place]
            assert not self._program.poll(), self._log.read_text()[-3000:]
            return None

        status, text = json.loads(wait_until(line, TIMEOUT_S))
        return status, text


@contextmanager
def answering(
    cases: Mapping[str, Case], env: Mapping[str, str], folder: Path, nursery: Nursery
) -> Iterator[Reference]:
    """A program that answers the cases, beside everything else."""
    requests = [
        [[cases[name].flags, cases[name].path, cases[name].body(MODEL)] for name in group]
        for group in in_company(cases)
    ]
    (folder / "requests.json").write_text(
        json.dumps({"flags": FLAGS, "reasoning": REASONING, "requests": requests})
    )
    (folder / "answers").touch()
    script = Path(__file__).with_name("single_app.py")
    with (folder / "requests.json").open() as asked, (folder / "log").open("w") as log:
        argv = [sys.executable, str(script), str(folder / "answers")]
        program = nursery.start(argv, env, log, stdin=asked)
        try:
            yield Reference(program, folder, list(cases))
        finally:
            # Its engine's process is in the group, and would stay.
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()


class About(float):
    """A number whose last bits depend on the requests that shared an engine's step."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and math.isclose(self, other, rel_tol=1e-3, abs_tol=1e-4)

    __hash__ = float.__hash__


def said(case: Case, text: str) -> Any:
    """An answer without what is a process's own; the pieces of a stream put together."""
    if not text.startswith(("data:", "event:")):
        parse_float = About if case.fields.get("n", 1) > 1 else float
        answer = json.loads(text, parse_float=parse_float)
        return _without_own(answer, keep_ids="request_id" in case.fields)
    events: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("data:") and line != "data: [DONE]":
            event = _without_own(json.loads(line.removeprefix("data:")))
            kind = event.get("type", "chunk")
            events[kind] = _joined(events.get(kind), event)
    events["ends"] = text.rstrip().endswith("[DONE]")
    return events


def _without_own(value: Any, *, keep_ids: bool = False) -> Any:
    if isinstance(value, list):
        return [_without_own(item) for item in value]
    if isinstance(value, dict):
        return {
            name: _without_own(item)
            for name, item in value.items()
            if name not in _OWN and (name != "id" or keep_ids)
        }
    return value


def _joined(before: Any, piece: Any, name: str = "") -> Any:
    """How many tokens a piece has is a matter of pace."""
    if before is None or piece is None:
        return before if piece is None else piece
    if isinstance(before, dict) and isinstance(piece, dict):
        names = {**before, **piece}
        return {key: _joined(before.get(key), piece.get(key), key) for key in names}
    if isinstance(before, list) and isinstance(piece, list):
        if all(isinstance(item, dict) and "index" in item for item in before + piece):
            found: dict[Any, Any] = {}
            for item in before + piece:
                found[item["index"]] = _joined(found.get(item["index"]), item)
            return [found[index] for index in sorted(found)]
        return before + piece
    if name in _PIECES and isinstance(before, str) and isinstance(piece, str):
        return before + piece
    return piece
