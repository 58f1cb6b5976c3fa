"""Asking from Python, without HTTP: Celery's own result."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.acceptance.running_stack import Stack

README = Path(__file__).parents[2] / "README.md"


def _run(stack: Stack, code: str) -> str:
    """Run `code` as a user's program would: another process that knows only the stack's home."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=stack.env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _submit(stack: Stack, arguments: str) -> dict[str, Any]:
    code = (
        "import json\nfrom pdtasks.pipeline import submit\n"
        f"print(json.dumps(submit({arguments}).get(timeout=60)))"
    )
    answer: dict[str, Any] = json.loads(_run(stack, code))
    return answer


def test_the_readmes_python_example_runs(stack: Stack) -> None:
    (example,) = re.findall(r"```python\n(from pdtasks.*?)```", README.read_text(), re.DOTALL)

    assert "Paris" in _run(stack, example)


def test_an_answer_has_text_tokens_reason_and_timings(stack: Stack) -> None:
    answer = _submit(stack, "'The capital of France is', temperature=0, max_tokens=3")

    assert answer["text"].startswith(" Paris")
    assert len(answer["token_ids"]) == 3
    assert answer["finish_reason"] == "length"
    assert answer["prompt_tokens"] == 5
    assert [s["stage"] for s in answer["stages"]] == ["prefill", "decode"]
    assert all(s["seconds"] > 0 for s in answer["stages"])
    assert answer["stages"][1]["kv_blocks_loaded"] == 1
    assert 0 < answer["time_to_first_token_s"] < 60


def test_an_answer_of_one_token_needs_no_decode(stack: Stack) -> None:
    answer = _submit(stack, "'The capital of France is', temperature=0, max_tokens=1")

    assert answer["text"] == " Paris"
    assert [s["stage"] for s in answer["stages"]] == ["prefill"]


def test_a_stop_string_ends_the_answer_across_the_stages(stack: Stack) -> None:
    arguments = "'The capital of France is', temperature=0, max_tokens=20, stop=['Paris.']"

    answer = _submit(stack, arguments)

    assert answer["text"].strip() == ""
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", "Paris.")


def test_an_impossible_request_raises_what_is_wrong(stack: Stack) -> None:
    code = (
        "from pdtasks.errors import InvalidRequest\nfrom pdtasks.pipeline import submit\n"
        "try:\n    submit('word ' * 5000).get(timeout=60)\n"
        "except InvalidRequest as exc:\n    print(exc)"
    )

    assert "maximum context length" in _run(stack, code)
