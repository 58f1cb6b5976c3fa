"""A worker that dies or stands costs time, never an answer: real engines, real restarts."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from pdtasks.worker.liveness import EXIT_NO_ENGINE
from tests.acceptance.running_stack import MODEL, WEDGE_SIGNAL, Stack, ask
from tests.waiting import wait_until

#: Seconds: until a worker is seen to stand, is replaced, and the new engine is up.
_REPLACED_S = 120.0


def _stream(client: httpx.Client, prompt: str, pieces: list[str]) -> str:
    """Append what comes to `pieces` as it comes; returns the finish reason."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": 300,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    reason = ""
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                (choice,) = event["choices"]
                pieces.append(choice["text"])
                reason = choice["finish_reason"] or reason
    return reason


def test_a_stream_outlives_its_engine_its_worker_and_the_start_of_the_next(stack: Stack) -> None:
    (pid,) = stack.worker_pids("decode")
    (core,) = [p for p in psutil.Process(pid).children() if "EngineCore" in p.name()]
    prompt = "The sea is wide. " * 20
    pieces: list[str] = []
    with stack.client() as client, ThreadPoolExecutor(1) as background:
        stream = background.submit(_stream, client, prompt, pieces)
        wait_until(lambda: len(pieces) > 20)

        core.kill()

        assert stream.result(timeout=_REPLACED_S) == "length"
        again: list[str] = []
        _stream(client, prompt, again)

    # Then a new worker went on where the other had ended: no token is missing, none is twice
    assert f"decode1 ended by itself (exit code {EXIT_NO_ENGINE})" in stack.said()
    assert stack.worker_pids("decode") != [pid]
    assert "".join(pieces) == "".join(again)


def test_a_worker_whose_main_loop_stands_is_replaced_and_its_jobs_are_answered(
    stack: Stack,
) -> None:
    (pid,) = stack.worker_pids("decode")
    with stack.client() as client, ThreadPoolExecutor(1) as background:
        os.kill(pid, WEDGE_SIGNAL)
        # While nobody can know yet, so that the worker is sent its job
        answer = background.submit(ask, client, "Name three rivers.", "wedged", max_tokens=8)

        # Then the API says why it can do nothing
        def the_api_says_why() -> bool:
            ready = client.get("/ready")
            return ready.status_code == 503 and "its main loop does not turn" in ready.text

        wait_until(the_api_says_why, 30)
        # and the next worker answers
        body = answer.result(timeout=_REPLACED_S)

        def both_stages_are_ready() -> bool:
            return client.get("/ready").status_code == 200

        wait_until(both_stages_are_ready)

    assert body["usage"]["completion_tokens"] == 8
    (successor,) = stack.worker_pids("decode")
    assert successor != pid
    assert "decode1 takes no jobs (stalled: its main loop does not turn)" in stack.said()
    # and its log shows where it stood
    assert "in _stand" in (stack.home / "logs" / "decode1.log").read_text(errors="replace")
