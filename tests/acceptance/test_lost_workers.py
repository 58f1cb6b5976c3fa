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

from pdtasks.liveness import EXIT_NO_ENGINE, EXIT_STALLED
from tests.acceptance.running_stack import MODEL, Stack, ask, started_stack, wait_until

#: Makes a worker's main loop stand still for ever, as `_WEDGE` arranges.
WEDGE_SIGNAL = signal.SIGRTMIN
# Python runs a module of this name in each process that starts; the handler runs in the main
# thread, which then waits for what nobody gives.  Nothing else of the worker is touched.
_WEDGE = """
import signal, threading

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
    return {"PYTHONPATH": str(folder), "PDTASKS_STALL_TIMEOUT_S": "2"}


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


def test_a_worker_whose_main_loop_stands_is_replaced_and_its_jobs_are_answered(
    fragile_stack: Stack,
) -> None:
    (pid,) = fragile_stack.worker_pids("decode")
    log = fragile_stack.home / "logs" / "decode1.log"
    with fragile_stack.client() as client, ThreadPoolExecutor(1) as background:
        os.kill(pid, WEDGE_SIGNAL)
        # While nobody can know yet, so that the worker is sent its job
        answer = background.submit(ask, client, "Name three rivers.", "wedged", max_tokens=8)

        def the_api_says_why() -> bool:
            ready = client.get("/ready")
            return ready.status_code == 503 and "its main loop does not turn" in ready.text

        wait_until(the_api_says_why, 30)
        body = answer.result(timeout=_REPLACED_S)

    assert body["usage"]["completion_tokens"] == 8
    assert "decode1 takes no jobs (stalled: its main loop does not turn)" in fragile_stack.said()
    assert "in _stand" in log.read_text(errors="replace")  # it says where it stood

    def both_are_ready() -> bool:
        return httpx.get(fragile_stack.api_url + "/ready").status_code == 200

    wait_until(both_are_ready)
    assert fragile_stack.worker_pids("decode") != [pid]


def test_a_worker_whose_engine_dies_ends_and_its_jobs_are_answered(fragile_stack: Stack) -> None:
    (pid,) = fragile_stack.worker_pids("prefill")
    (core,) = [p for p in psutil.Process(pid).children() if "EngineCore" in p.name()]
    with fragile_stack.client() as client, ThreadPoolExecutor(1) as background:
        core.suspend()
        answer = background.submit(ask, client, "Name three hills.", "no-engine", max_tokens=8)
        wait_until(lambda: fragile_stack.status()["queues"])

        core.kill()

        body = answer.result(timeout=_REPLACED_S)

    assert body["usage"]["completion_tokens"] == 8
    assert f"prefill1 ended by itself (exit code {EXIT_NO_ENGINE})" in fragile_stack.said()


def test_a_worker_by_hand_whose_main_loop_stands_ends_with_its_own_code(
    fragile_stack: Stack, wedge: dict[str, str], tmp_path: Path
) -> None:
    with fragile_stack.joined_by("decode", tmp_path, wedge) as worker:
        worker.send_signal(WEDGE_SIGNAL)

        assert worker.wait(timeout=60) == EXIT_STALLED

    said = (tmp_path / "worker.log").read_text(errors="replace")
    assert "its main loop does not turn: ending the process" in said
    assert "in _stand" in said
