"""A worker that dies or stands costs time, never an answer: real engines, real restarts."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from pdtasks.worker.liveness import EXIT_NO_ENGINE, EXIT_STALLED
from tests.acceptance.running_stack import MODEL, Stack, ask, started_stack
from tests.waiting import wait_until

#: Makes a worker's main loop stand still for ever, as `_WEDGE` arranges.
WEDGE_SIGNAL = signal.SIGRTMIN
# Python runs a module of this name in each process that starts; the handler runs in the main
# thread, which then waits for what nobody gives.  Nothing else of the worker is touched.
_WEDGE = """
import signal, threading
from tests.waiting import wait_until

def _stand(*_):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

signal.signal(signal.SIGRTMIN, _stand)
"""
#: Seconds: until the main loop is seen to stand, is replaced, and the new engine is up.
_REPLACED_S = 120.0


@pytest.fixture(scope="module")
def wedge(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Changes to an environment whose workers obey `WEDGE_SIGNAL`."""
    folder = tmp_path_factory.mktemp("wedge")
    (folder / "sitecustomize.py").write_text(_WEDGE)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PDTASKS_STALL_TIMEOUT_S": "2"}


@pytest.fixture(scope="module")
def fragile_stack(
    wedge: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """A stack of its own: others must not meet what happens to its workers."""
    with started_stack(tmp_path_factory.mktemp("fragile"), wedge) as running:
        yield running


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


def test_a_stream_outlives_its_decode_worker_and_the_start_of_the_next_engine(
    fragile_stack: Stack,
) -> None:
    (pid,) = fragile_stack.worker_pids("decode")
    prompt = "The sea is wide. " * 20
    pieces: list[str] = []
    with fragile_stack.client() as client, ThreadPoolExecutor(1) as background:
        stream = background.submit(_stream, client, prompt, pieces)
        wait_until(lambda: len(pieces) > 20)

        os.kill(pid, signal.SIGKILL)

        assert stream.result(timeout=_REPLACED_S) == "length"
        again: list[str] = []
        _stream(client, prompt, again)

    # Then a new worker went on where the other had ended: no token is missing, none is twice
    assert fragile_stack.worker_pids("decode") != [pid]
    assert "".join(pieces) == "".join(again)


def test_workers_whose_main_loop_stands_end_or_are_replaced_and_their_jobs_are_answered(
    fragile_stack: Stack, wedge: dict[str, str], tmp_path: Path
) -> None:
    (pid,) = fragile_stack.worker_pids("decode")
    # Given another decode worker, started by hand
    with (
        fragile_stack.joined_by("decode", tmp_path, wedge) as by_hand,
        fragile_stack.client() as client,
        ThreadPoolExecutor(1) as background,
    ):
        # When both stand
        os.kill(pid, WEDGE_SIGNAL)
        by_hand.send_signal(WEDGE_SIGNAL)
        # While nobody can know yet, so that one of them is sent its job
        answer = background.submit(ask, client, "Name three rivers.", "wedged", max_tokens=8)

        # Then the API says why it can do nothing
        def the_api_says_why() -> bool:
            ready = client.get("/ready")
            return ready.status_code == 503 and "its main loop does not turn" in ready.text

        wait_until(the_api_says_why, 30)
        # and the one by hand ends with its own code, says why, and takes its engine along
        core = psutil.Process(by_hand.pid).children()[0]
        assert by_hand.wait(timeout=60) == EXIT_STALLED
        wait_until(lambda: not core.is_running())
        # and the other one is replaced, and answers
        body = answer.result(timeout=_REPLACED_S)

        def both_stages_are_ready() -> bool:
            return client.get("/ready").status_code == 200

        wait_until(both_stages_are_ready)

    assert body["usage"]["completion_tokens"] == 8
    (successor,) = fragile_stack.worker_pids("decode")
    assert successor != pid
    assert "decode1 takes no jobs (stalled: its main loop does not turn)" in fragile_stack.said()
    by_hand_said = (tmp_path / "worker.log").read_text(errors="replace")
    assert "its main loop does not turn: ending the process" in by_hand_said
    replaced_said = (fragile_stack.home / "logs" / "decode1.log").read_text(errors="replace")
    for said in (by_hand_said, replaced_said):
        assert "in _stand" in said  # where it stood


def test_a_worker_whose_engine_dies_ends_and_its_jobs_are_answered(fragile_stack: Stack) -> None:
    (pid,) = fragile_stack.worker_pids("prefill")
    (core,) = [p for p in psutil.Process(pid).children() if "EngineCore" in p.name()]
    with fragile_stack.client() as client, ThreadPoolExecutor(1) as background:
        core.suspend()
        answer = background.submit(ask, client, "Name three hills.", "no-engine", max_tokens=8)
        wait_until(lambda: any(w["active"] for w in fragile_stack.status()["workers"]))

        core.kill()

        body = answer.result(timeout=_REPLACED_S)

    assert body["usage"]["completion_tokens"] == 8
    assert f"prefill1 ended by itself (exit code {EXIT_NO_ENGINE})" in fragile_stack.said()
