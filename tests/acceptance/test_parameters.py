"""Each parameter of docs/api.md does what it does in vLLM: the same body, the same answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.parameter_cases import CASES, FLAGS, REASONING, Case
from tests.acceptance.running_stack import MODEL, Stack, free_ports
from tests.waiting import wait_until

BUDGETS = ("a budget", "a budget that is spent")

# The first test waits for all answers.
pytestmark = pytest.mark.timeout(600)

#: Names, times and counts of a process's own; all else of an answer has to be equal.
_OWN = {
    *("created", "created_at", "completed_at", "system_fingerprint", "sequence_number"),
    *("item_id", "call_id"),
}
#: Text that comes in pieces.
_PIECES = {"text", "content", "reasoning", "arguments", "partial_json", "delta", "thinking"}


@pytest.fixture(scope="module")
def single_app(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The reference is at work while the stack is asked."""
    folder = tmp_path_factory.mktemp("single_app")
    script = Path(__file__).with_name("single_app.py")
    requests = [[case.flags, case.path, case.body(MODEL)] for case in CASES.values()]
    (folder / "requests.json").write_text(
        json.dumps({"flags": FLAGS, "reasoning": REASONING, "requests": requests})
    )
    with (folder / "requests.json").open() as asked, (folder / "log").open("w") as log:
        program = subprocess.Popen(
            [sys.executable, str(script), str(folder / "answers.json")],
            env=stack.env,
            stdin=asked,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield lambda: _answers(program, folder)
        finally:
            program.kill()
            program.wait()


def _answers(program: subprocess.Popen[bytes], folder: Path) -> dict[str, tuple[int, str]]:
    assert program.wait(240) == 0, (folder / "log").read_text()[-3000:]
    found = json.loads((folder / "answers.json").read_text())
    return {name: (status, text) for name, (status, text) in zip(CASES, found, strict=True)}


@pytest.fixture(scope="module")
def other_api(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An API of the same workers with the flags "reasoning"."""
    (port,) = free_ports(1)
    flags = [*FLAGS["reasoning"].split(), "--reasoning-parser", REASONING["reasoning"]]
    with (tmp_path_factory.mktemp("other_api") / "log").open("w") as log:
        api = subprocess.Popen(
            [sys.executable, "-m", "pdtasks.cli", "api", "--port", str(port), *flags],
            env=stack.env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            api.terminate()
            api.wait(timeout=40)


@pytest.fixture(scope="module")
def answers(
    stack: Stack, other_api: str, single_app: Any
) -> dict[str, tuple[tuple[int, str], tuple[int, str]]]:
    """What the stack and the single app answer to each case."""

    def it_is_ready() -> bool:
        try:
            return httpx.get(other_api + "/ready").status_code == 200
        except httpx.HTTPError:
            return False

    ours = {}
    order = sorted(CASES, key=lambda name: CASES[name].flags != "tools")  # that one is there
    with stack.client() as client:
        for name in order:
            case = CASES[name]
            if case.flags == "reasoning":
                wait_until(it_is_ready, 120)
            url = {"tools": stack.api_url, "reasoning": other_api}[case.flags]
            response = client.post(url + case.path, json=case.body(MODEL))
            ours[name] = (response.status_code, response.text)
    reference = single_app()
    return {name: (ours[name], reference[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_that_of_a_single_engine(
    name: str, answers: dict[str, tuple[tuple[int, str], tuple[int, str]]]
) -> None:
    case = CASES[name]
    (status, text), (reference_status, reference) = answers[name]

    assert status == reference_status == case.status, text
    assert said(case, text) == said(case, reference)


def test_a_budget_is_kept_across_the_hand_over(
    answers: dict[str, tuple[tuple[int, str], tuple[int, str]]],
) -> None:
    texts = [json.loads(answers[name][0][1])["choices"][0]["text"] for name in BUDGETS]

    assert all(" done." in text for text in texts), texts


@pytest.mark.parametrize(
    "path",
    [
        *("/inference/v1/generate", "/inference/v1/abort_requests", "/scale_elastic_ep"),
        *("/v1/embeddings", "/pooling", "/score", "/v1/audio/transcriptions"),
        "/v1/load_lora_adapter",
    ],
)
def test_what_does_not_go_through_the_stages_has_no_route(path: str, client: httpx.Client) -> None:
    body = {"model": MODEL, "input": "x", "request_ids": ["x"], "new_data_parallel_size": 2}

    response = client.post(path, json=body)

    assert response.status_code == 404
    assert response.json()["error"]["code"] == 404


def said(case: Case, text: str) -> Any:
    """An answer without what is a process's own; the pieces of a stream put together."""
    if not text.startswith(("data:", "event:")):
        return _without_own(json.loads(text), keep_ids="request_id" in case.fields)
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
