"""What acceptance tests use of a running stack."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import valkey

MODEL = "SmolLM2-135M-Instruct"
START_TIMEOUT_S = 240.0


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Return the first true value of `condition`; fail the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {condition.__name__}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@dataclass
class Stack:
    """A running `pdtasks up`."""

    home: Path
    api_url: str
    flower_url: str
    env: dict[str, str]  #: for processes that join: nothing but the home is needed

    def status(self) -> dict[str, Any]:
        """What `pdtasks status --json` says."""
        done = subprocess.run(
            [sys.executable, "-m", "pdtasks.cli", "status", "--json"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def private(self, name: str) -> str:
        """A PDTASKS_* value of the stack, password and all."""
        env: dict[str, str] = json.loads((self.home / "stack.json").read_text())["env"]
        return env[f"PDTASKS_{name.upper()}"]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.api_url, timeout=120)

    @cached_property
    def bus(self) -> valkey.Valkey:
        return valkey.Valkey.from_url(self.private("bus_url"))

    @cached_property
    def kv(self) -> valkey.Valkey:
        return valkey.Valkey.from_url(self.private("kv_urls"))

    def worker_pids(self, role: str) -> list[int]:
        return [w["pid"] for w in self.status()["workers"] if w["role"] == role]

    @contextmanager
    def paused(self, role: str) -> Iterator[None]:
        """The workers of `role` take no jobs in between."""
        pids = self.worker_pids(role)
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def logs(self) -> str:
        return "".join(p.read_text(errors="replace") for p in (self.home / "logs").glob("*.log"))


def ask(client: httpx.Client, prompt: str, request_id: str, **fields: Any) -> dict[str, Any]:
    """One chat question; returns the response's body with the stages under `stages`."""
    response = client.post(
        "/v1/chat/completions",
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            **fields,
        },
        headers={"X-Request-Id": request_id},
    )
    body: dict[str, Any] = response.json()
    assert response.status_code == 200, body
    report = client.get(f"/pdtasks/requests/chatcmpl-{request_id}").json()
    body["stages"] = report["sequences"][0]
    return body
