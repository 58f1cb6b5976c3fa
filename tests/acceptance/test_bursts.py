"""Bursts on the real model: everybody is answered, nothing reconnects, nothing stands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.acceptance.running_stack import Stack, ask
from tests.waiting import wait_until

ROUNDS = 1
#: Of 300 at once; then twice "n": 512 and a plain one.
REQUESTS = ROUNDS * 300 + 3
#: The API's and the prefill worker's publishers, and the API's aborts, connect with the first use.
FIRST_USES = 3


def test_bursts_are_answered_without_reconnects_and_a_plain_request_right_after(
    stack: Stack, client: httpx.Client, tmp_path: Path
) -> None:
    file = tmp_path / "burst.json"
    lost_before = stack.logs().count("Connection to broker lost")

    done = subprocess.run(
        [
            *(sys.executable, "-m", "pdtasks.cli", "bench", "burst"),
            *("--rounds", str(ROUNDS), "--json", str(file)),
        ],
        env=stack.env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    sys.stdout.write(done.stdout + done.stderr)
    figures = json.loads(file.read_text())
    assert figures["requests"] == figures["answered"] == REQUESTS
    assert figures["connections_opened"] <= FIRST_USES
    assert stack.logs().count("Connection to broker lost") == lost_before

    # And the stack is as quick as before
    began = time.monotonic()
    body = ask(client, "What is the capital of France?", "after-bursts", max_tokens=16)
    assert time.monotonic() - began < 5
    assert body["choices"][0]["message"]["content"] == "The capital of France is Paris."

    def both_are_ready() -> bool:
        return [w.state for w in stack.workers()] == ["ready", "ready"]

    wait_until(both_are_ready)
