"""`pdtasks demo`: does it work on this host?  One question through a stack of its own, with proof.

The stack lives in a temporary home on free ports, so one that runs already is not disturbed.  The
proof is what the two stages say they did: an answer alone proves nothing, for decode would quietly
compute the prompt again if the KV blocks were lost.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pdtasks.cluster.children import stack_settings
from pdtasks.cluster.console import Console
from pdtasks.cluster.signals import StopRequested, StopSignals
from pdtasks.cluster.stack import StackLock
from pdtasks.cluster.supervisor import Size, Supervisor
from pdtasks.errors import PdtasksError
from pdtasks.naming import DECODE, PREFILL

_MAX_TOKENS = 64
_TIMEOUT_S = 300.0
_INTERRUPTED = 130  # as shells report a Ctrl-C


class DemoFailed(PdtasksError):
    """The stack ran, but the answer or its proof is not as it must be."""


@dataclass
class _Answer:
    request_id: str
    text: str = ""
    times: list[float] = field(default_factory=list)  #: seconds after the request, for each piece

    @property
    def first_s(self) -> float:
        return self.times[0]

    @property
    def between_s(self) -> float:
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


def run_demo(prompt: str, console: Console) -> int:
    """Ask `prompt`, print answer and proof; returns the exit code.

    Nothing stays behind, except the logs when it failed.
    """
    home = Path(tempfile.mkdtemp(prefix="pdtasks-demo-"))
    code = 1
    failure: Exception | None = None
    try:
        # Services that are configured belong to others; the demonstration has its own.
        settings = stack_settings(
            home=home,
            broker_url=None,
            broker_api_url=None,
            bus_url=None,
            bus_urls=(),
            kv_urls=(),
            api_host="127.0.0.1",
            api_port=0,
            flower_port=0,
            # The hand-over is what there is to see; so short a prompt would go without.
            short_prompt_tokens=0,
        )
        with StackLock(home), StopSignals() as signals:
            supervisor = Supervisor(settings, Size(flower=False), console, signals)
            try:
                supervisor.start()
                with signals.interruptible():
                    _show(supervisor.settings.model_name, _api_url(supervisor), prompt, console)
                code = 0
            except StopRequested:
                code = _INTERRUPTED
            except (PdtasksError, httpx.HTTPError) as exc:
                failure = exc
            finally:
                supervisor.stop()
    finally:
        _clean(home, console, keep_logs=code == 1)
    if failure is not None:  # after the stop, so that it is the last thing to read
        console.bad(f"the demonstration failed: {failure}")
    return code


def _api_url(supervisor: Supervisor) -> str:
    return f"http://127.0.0.1:{supervisor.settings.api_port}"


def _show(model: str, url: str, prompt: str, console: Console) -> None:
    # No proxy from the environment: this is our own host.
    with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
        console.line(f"\n> {prompt}\n")
        answer = _ask(client, model, prompt, console)
        if not answer.text.strip():
            raise DemoFailed("the answer is empty")
        _prove(_report(client, answer.request_id), answer, console)


def _ask(client: httpx.Client, model: str, prompt: str, console: Console) -> _Answer:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
    }
    name = f"demo-{secrets.token_hex(6)}"
    answer = _Answer(f"chatcmpl-{name}")  # vLLM names the response after this header
    began = time.monotonic()
    with client.stream(
        "POST", "/v1/chat/completions", json=body, headers={"X-Request-Id": name}
    ) as response:
        if response.status_code != 200:
            response.read()
            raise DemoFailed(f"the API answered {response.status_code}: {response.text[:500]}")
        for piece in _pieces(response):
            answer.times.append(time.monotonic() - began)
            answer.text += piece
            console.piece(piece)
    console.line("\n")
    return answer


def _pieces(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise DemoFailed(f"the answer broke off: {chunk['error']}")
        for choice in chunk.get("choices", ()):
            if piece := choice["delta"].get("content"):
                yield piece


def _report(client: httpx.Client, request_id: str) -> dict[str, Any]:
    response = client.get(f"/pdtasks/requests/{request_id}")
    if response.status_code != 200:
        raise DemoFailed(f"the API knows no report of {request_id} ({response.status_code})")
    stages: dict[str, Any] = response.json()["sequences"][0]
    return stages


def _prove(stages: dict[str, Any], answer: _Answer, console: Console) -> None:
    prefill, decode = stages[PREFILL], stages.get(DECODE)
    console.line(
        f"prefill  {prefill['worker']}: {prefill['prompt_tokens']} prompt tokens in "
        f"{prefill['seconds'] * 1000:.0f} ms, {prefill['kv_blocks_written']} KV blocks "
        f"({prefill['kv_bytes_written']:,} bytes) written"
    )
    if decode is None:
        console.line("decode   not needed: the answer ended with its first token")
    else:
        console.line(
            f"decode   {decode['worker']}: {decode['output_tokens']} output tokens in "
            f"{decode['seconds'] * 1000:.0f} ms, {decode['kv_blocks_loaded']} KV blocks "
            f"({decode['kv_bytes_loaded']:,} bytes) loaded, "
            f"{decode['kv_blocks_recomputed']} recomputed"
        )
    console.line(
        f"stream   first token after {answer.first_s * 1000:.0f} ms, then one every "
        f"{answer.between_s * 1000:.1f} ms\n"
    )
    if decode is not None and decode["kv_blocks_loaded"] < prefill["kv_blocks_written"]:
        raise DemoFailed(
            f"decode loaded {decode['kv_blocks_loaded']} of {prefill['kv_blocks_written']} KV "
            "blocks: the answer was computed twice instead of handed over"
        )


def _clean(home: Path, console: Console, *, keep_logs: bool) -> None:
    if keep_logs and (home / "logs").is_dir():
        for entry in home.iterdir():
            if entry.name != "logs":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        console.line(f"the logs are kept in {home / 'logs'}")
    else:
        shutil.rmtree(home, ignore_errors=True)
