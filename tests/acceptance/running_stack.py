"""What acceptance tests use of a running stack."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
import valkey

from pdtasks.bus.presence import read_workers
from pdtasks.cluster.probes import free_ports, http_status
from pdtasks.messages import WorkerStatus
from tests.acceptance.nursery import Nursery
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
START_TIMEOUT_S = 240.0
#: All is plain HTTP here, and to load the system's certificates takes a client 50 ms.
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

#: Makes a process's main thread stand still for ever, where `wedge_by_signal` has arranged it.
WEDGE_SIGNAL = signal.SIGRTMIN
# Python runs a module of this name in each process that starts; the handler runs in the main
# thread, which then waits for what nobody gives.  Nothing else of the process is touched.
_WEDGE = """
import signal, threading

def _stand(*_):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGRTMIN, _stand)
"""


def wedge_by_signal(folder: Path) -> dict[str, str]:
    """Changes to an environment whose Python processes obey `WEDGE_SIGNAL`."""
    (folder / "sitecustomize.py").write_text(_WEDGE)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path}


def free_pair() -> int:
    """The first of two ports that follow each other."""
    for _ in range(100):
        (port,) = free_ports(1)
        with suppress(OSError, OverflowError), socket.socket() as next_one:
            next_one.bind(("127.0.0.1", port + 1))
            return port
    raise LookupError("no two free ports beside each other")


@dataclass
class Stack:
    """A running `pdtasks up`."""

    home: Path
    api_url: str
    flower_url: str
    env: dict[str, str]  #: for processes that join: nothing but the home is needed

    def said(self) -> str:
        """What `pdtasks up` has printed."""
        return (self.home / "up.txt").read_text()

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

    def operator_url(self, role: str) -> str:
        """The URL with all rights that no child has."""
        return self.operator_urls()[role]

    def operator_urls(self) -> dict[str, str]:
        """All of them."""
        urls: dict[str, str] = json.loads((self.home / "stack.json").read_text())["operator_urls"]
        return urls

    @property
    def other_api_url(self) -> str:
        """Of the second API process."""
        start, _, port = self.api_url.rpartition(":")
        return f"{start}:{int(port) + 1}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.api_url, timeout=120, verify=_NO_TLS)

    @cached_property
    def bus(self) -> valkey.Valkey:
        return valkey.Valkey.from_url(self.operator_url("bus"))

    @cached_property
    def kv(self) -> valkey.Valkey:
        return valkey.Valkey.from_url(self.operator_url("kv"))

    def workers(self) -> list[WorkerStatus]:
        """What the workers say of themselves; unlike `status` for a test that waits for it."""
        return read_workers(self.bus)

    def worker_pids(self, role: str) -> list[int]:
        return [w.pid for w in self.workers() if w.role == role]

    def service_pids(self, role: str) -> list[int]:
        """Processes that are no workers, as "api", in the order of their start."""
        services = json.loads((self.home / "stack.json").read_text())["services"]
        return [s["pid"] for s in services if s["role"] == role]

    @contextmanager
    def paused(self, role: str) -> Iterator[None]:
        """The workers of `role` stand still in between: they take no jobs."""
        with self.standing(self.worker_pids(role)):
            yield

    @contextmanager
    def standing(self, pids: list[int]) -> Iterator[None]:
        """These processes stand still in between."""
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    @contextmanager
    def joined_by(
        self, role: str, folder: Path, changes: dict[str, str], nursery: Nursery
    ) -> Iterator[int]:
        """A worker other@…, started by hand in `folder`, is there in between; yields its pid.

        Args:
            changes: to its environment.
            nursery: it forks off there.
        """
        log = (folder / "worker.log").open("w")
        argv = [
            *(sys.executable, "-m", "celery", "-A", "pdtasks", "worker", "-Q", role),
            *("-P", "threads", "-c", "2", "-n", "other@%h"),
        ]
        env = self.env | changes | {"VLLM_CPU_OMP_THREADS_BIND": "1"}
        worker = nursery.start(argv, env, log, cwd=folder)
        try:

            def it_has_joined() -> bool:
                assert worker.poll() is None, (folder / "worker.log").read_text()[-3000:]
                return any(w.pid == worker.pid and w.state == "ready" for w in self.workers())

            wait_until(it_has_joined, 120)
            yield worker.pid
        finally:
            worker.terminate()
            worker.wait(timeout=60)
            log.close()

    def log(self, name: str) -> str:
        """What the child called so has logged."""
        return (self.home / "logs" / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        return "".join(p.read_text(errors="replace") for p in (self.home / "logs").glob("*.log"))


@contextmanager
def started_stack(home: Path, changes: Mapping[str, str], nursery: Nursery) -> Iterator[Stack]:
    """`pdtasks up` with one worker for each stage and two API processes, ready.

    Stopped cleanly in the end.

    Args:
        changes: to its environment.
        nursery: where it and its workers fork off.
    """
    nursery.wait()
    api_port, flower_port = free_pair(), free_ports(1)[0]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}
    # A small cache: touching it for the first time is a part of each engine's start.
    env |= {"PDTASKS_HOME": str(home), "PDTASKS_CPU_KV_CACHE_GIB": "1"}
    # Prompts of tests are short; nearly all tests are about the way through both stages.
    env |= {"PDTASKS_SHORT_PROMPT_TOKENS": "1"}
    # An engine takes a thread for each core of the host: where several engines share two cores,
    # threads mostly wait for each other, at twice the CPU time.
    env |= {"OMP_NUM_THREADS": "1"} | dict(changes)
    log = (home / "up.txt").open("w")
    up = nursery.start(
        [
            *(sys.executable, "-m", "pdtasks.cli", "up", "--prefill", "1", "--decode", "1"),
            *("--api", "2", "--port", str(api_port), "--flower-port", str(flower_port)),
        ],
        env,
        log,
    )
    running = Stack(home, f"http://127.0.0.1:{api_port}", f"http://127.0.0.1:{flower_port}", env)
    try:

        def workers_are_ready() -> bool:
            assert up.poll() is None, running.said()
            try:
                workers = running.workers()
            except (OSError, LookupError, valkey.ValkeyError):  # no stack or no bus yet
                return False
            return len(workers) == 2 and all(w.state == "ready" for w in workers)

        def api_and_flower_answer() -> bool:
            return (
                http_status(running.api_url + "/ready?split=true") == 200
                and http_status(running.other_api_url + "/ready?split=true") == 200
                and http_status(running.flower_url + "/healthcheck") == 200
            )

        wait_until(workers_are_ready, START_TIMEOUT_S)
        wait_until(api_and_flower_answer, START_TIMEOUT_S)
        yield running
        running.bus.close()
        running.kv.close()
    finally:
        tree = psutil.Process(up.pid).children(recursive=True) if up.poll() is None else []
        up.send_signal(signal.SIGINT)
        code = up.wait(timeout=90)
        log.close()
        left = [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert code == 0, running.said()
        assert not left, f"still there after a clean stop: {left}"


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


def answers_by(
    stack: Stack, role: str, pid: int, send: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What the worker `pid`, called other@…, answers while the others of its `role` are stopped.

    `send` is called with 1 and 2: the broker may hand one job to a stopped worker, which keeps it
    until it wakes.
    """
    others = [other for other in stack.worker_pids(role) if other != pid]
    for other in others:
        os.kill(other, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(2) as background:
            answers = [background.submit(send, n) for n in (1, 2)]

            def one_is_answered() -> bool:
                return any(answer.done() for answer in answers)

            try:
                wait_until(one_is_answered, 60)
            finally:
                for other in others:
                    os.kill(other, signal.SIGCONT)
            done = [answer.result(timeout=60) for answer in answers]
    finally:
        for other in others:
            os.kill(other, signal.SIGCONT)
    by_pid = [d for d in done if d["stages"][role]["worker"].startswith("other@")]
    assert by_pid, "the stopped workers have taken both"
    return by_pid
