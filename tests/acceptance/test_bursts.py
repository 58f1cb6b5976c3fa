"""Do bursts stall the stack? With the real model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.acceptance.running_stack import MODEL, Stack


def test_bursts_are_answered_and_stall_nobody(
    stack: Stack, client: httpx.Client, tmp_path: Path
) -> None:
    # Five rounds of 300 parallel requests of one token, then 512 choices twice
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pdtasks.cli", "bench", "burst"),
            *("--rounds", "5", "--json", str(tmp_path / "burst.json")),
        ],
        env=stack.env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "burst.json").read_text())
    assert figures["requests"] == figures["answered"] == 5 * 300 + 2 + 1
    # (an event sender or Flower may connect again; a stack that stalls opened thousands)
    assert figures["connections_opened"] <= 4

    # Then a plain request is answered at once, and everybody is well
    began = time.monotonic()
    response = client.post(
        "/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 4}, timeout=5
    )
    assert response.status_code == 200
    assert time.monotonic() - began < 5
    assert [w["state"] for w in stack.status()["workers"]] == ["ready", "ready"]
    assert client.get("/ready").status_code == 200
    assert "Connection to broker lost" not in stack.logs()
