"""A worker that dies or stands costs time, never an answer: real engines, real restarts."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import psutil

from pdtasks.worker.liveness import EXIT_NO_ENGINE
from tests.acceptance.running_stack import MODEL, WEDGE_SIGNAL, Stack, ask
from tests.waiting import wait_until

#: Seconds: until a worker is seen to stand, is replaced, and the new engine is up.
_REPLACED_S = 120.0


#: The model is sure of what follows: a recompute that differs in the last bits changes no token.
_PROMPT = "The sea is wide. " * 20
_TOKENS = 60
#: Requests that a lost worker leaves half answered. The last one no second attempt would repeat.
_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.3, "seed": 7},
    "bound to a grammar": {
        "temperature": 0,
        "structured_outputs": {"regex": "(The sea is wide\\. )+"},
    },
    "random": {"temperature": 1.0},
}


def _stream(client: httpx.Client, fields: dict[str, Any], pieces: list[str]) -> int:
    """Append what comes to `pieces` as it comes; returns the number of tokens."""
    body = {
        "model": MODEL,
        "prompt": _PROMPT,
        "max_tokens": _TOKENS,
        "min_tokens": _TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    tokens = 0
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                pieces += [choice["text"] for choice in event["choices"]]
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
    return tokens


def test_streams_outlive_their_engine_its_worker_and_the_start_of_the_next(stack: Stack) -> None:
    (pid,) = stack.worker_pids("decode")
    (core,) = [p for p in psutil.Process(pid).children() if "EngineCore" in p.name()]
    texts: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    undisturbed: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    with stack.client() as client, ThreadPoolExecutor(len(_KINDS)) as background:

        def stream(into: dict[str, list[str]]) -> list[Future[int]]:
            return [
                background.submit(_stream, client, fields, into[kind])
                for kind, fields in _KINDS.items()
            ]

        streams = stream(texts)
        wait_until(lambda: all(len(pieces) > 20 for pieces in texts.values()))

        core.kill()

        # Then a new worker goes on where the other has ended: no token is missing, none is twice
        assert [s.result(timeout=_REPLACED_S) for s in streams] == [_TOKENS] * len(_KINDS)
        assert f"decode1 ended by itself (exit code {EXIT_NO_ENGINE})" in stack.said()
        assert stack.worker_pids("decode") != [pid]
        went_on = re.findall(r"goes on after (\d+) tokens", stack.log("decode1"))
        assert len(went_on) == len(_KINDS)
        assert all(int(tokens) > 20 for tokens in went_on)
        # and but for the random one it says what it would have said
        for other in stream(undisturbed):
            other.result(timeout=_REPLACED_S)
    for kind in list(_KINDS)[:-1]:
        assert "".join(texts[kind]) == "".join(undisturbed[kind]), kind


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
    assert "in _stand" in stack.log("decode1")
