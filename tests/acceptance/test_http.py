"""What a user of the HTTP API sees, with the official client and without."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import psutil
import pytest

from pdtasks.bus.presence import read_workers
from pdtasks.cluster.probes import free_ports, http_status
from pdtasks.worker import discarding
from tests.acceptance.nursery import Nursery
from tests.acceptance.running_stack import MODEL, Stack, ask
from tests.waiting import wait_until

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "Greece": "Athens",
    "Egypt": "Cairo",
}


def test_streams_the_answer_with_the_official_client(stack: Stack) -> None:
    with openai.OpenAI(base_url=stack.api_url + "/v1", api_key="none") as user:
        stream = user.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=32,
            stream=True,
        )
        pieces = [c.choices[0].delta.content for c in stream if c.choices[0].delta.content]

    assert len(pieces) > 3
    assert "".join(pieces) == "The capital of France is Paris."


def test_lists_its_model(client: httpx.Client) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == [MODEL]
    assert client.get("/health").status_code == 200


def test_completions_answer_in_one_piece(client: httpx.Client) -> None:
    body = client.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "stop": "."},
    ).json()

    assert body["choices"][0]["text"].strip() == "Paris"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens"] == 5


def test_the_stages_ran_on_different_workers(client: httpx.Client) -> None:
    body = ask(client, "What is the capital of Spain?", "stages", max_tokens=16)

    stages = body["stages"]
    assert stages["prefill"]["worker"].startswith("prefill")
    assert stages["decode"]["worker"].startswith("decode")
    assert stages["prefill"]["output_tokens"] == 1
    assert stages["decode"]["output_tokens"] == body["usage"]["completion_tokens"] - 1


def test_sixteen_parallel_requests_share_the_engines_steps(
    stack: Stack, client: httpx.Client
) -> None:
    questions = list(CAPITALS.items()) * 2
    before = _reply_counters(client)

    def answer(country: str) -> str:
        with stack.client() as own:
            response = own.post(
                "/v1/completions",
                json={
                    "model": MODEL,
                    "prompt": "The capital of Poland is Warsaw. The capital of Portugal is Lisbon. "
                    f"The capital of {country} is",
                    "temperature": 0,
                    "max_tokens": 32,
                    "ignore_eos": True,
                },
            )
            response.raise_for_status()
            text: str = response.json()["choices"][0]["text"]
            return text

    with ThreadPoolExecutor(16) as users:
        answers = list(users.map(answer, [country for country, _ in questions]))

    for (_, city), text in zip(questions, answers, strict=True):
        assert text.strip().startswith(city)
    # One message for each step: far fewer than the 16 * 32 tokens in them.
    after = _reply_counters(client)
    assert after["outputs"] - before["outputs"] == 16 * 32
    assert after["replies"] - before["replies"] < 16 * 32 / 4


def _reply_counters(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line[:1] not in ("#", ""))
    return {name: float(values[f"pdtasks_{name}_total"]) for name in ("replies", "outputs")}


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_caller_that_hangs_up_frees_everything(stage: str, stack: Stack) -> None:
    prompt = f"{stage}: tell me a long story about a whale. " * 8
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
    }

    # When the caller goes away before the first token, or in the middle of the answer
    with stack.client() as caller, caller.stream("POST", "/v1/chat/completions", json=body) as r:
        lines = r.iter_lines()
        if stage == "decode":
            for _ in range(12):
                next(lines)

            def vllm_holds_its_blocks() -> bool:
                return any(w.role == "decode" and w.kv_usage > 0 for w in read_workers(stack.bus))

            wait_until(vllm_holds_its_blocks)

    # Then both engines have dropped it, by vLLM's own count of blocks in use
    def engines_are_idle() -> bool:
        return all(w.active == 0 and w.kv_usage == 0 for w in read_workers(stack.bus))

    wait_until(engines_are_idle)
    # and nothing of the request is left anywhere
    _only_shared_blocks_soon(stack)


def test_a_finished_request_leaves_only_shared_blocks(stack: Stack, client: httpx.Client) -> None:
    ask(client, "Say something about rain. " * 30, "leftovers", max_tokens=8)

    _only_shared_blocks_soon(stack)
    assert stack.kv.dbsize(), "the blocks that others can share stay"


def _only_shared_blocks_soon(stack: Stack) -> None:
    bus = stack.bus

    def only_blocks_named_by_content_and_with_a_ttl() -> bool:
        return all(
            re.fullmatch(rb"pd:kv:[0-9a-f]{16}:\d+:[0-9a-f]{64}", key)
            and cast("int", stack.kv.ttl(key)) > 0
            for key in stack.kv.scan_iter()
        )

    def only_presence_an_empty_reply_stream_and_results_with_a_ttl() -> bool:
        return all(
            bus.xlen(key) == 0
            if key.startswith(b"pd:reply:")
            else key.startswith(
                (b"pd:worker:", b"pd:workers", b"pd:api:", b"pd:apis", b"celery-task-meta-")
            )
            and cast("int", bus.ttl(key)) > 0
            for key in bus.scan_iter()
            # What tests before had the stack keep for them is theirs.
            if not key.startswith((b"pd:job", b"pd:file", b"pd:batch"))
        )

    # A block that a request has outrun on its way to the store is looked for again.
    deadline = time.monotonic() + sum(discarding.AGAIN_S) + 3
    for clean in (
        only_blocks_named_by_content_and_with_a_ttl,
        only_presence_an_empty_reply_stream_and_results_with_a_ttl,
    ):
        wait_until(clean, deadline - time.monotonic())


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "another"}, 404, "does not exist"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "maximum context"),
        ({"temperature": -1}, 400, "temperature"),
        ({"messages": "no list"}, 400, "messages"),
        ({"max_tokens": 5000}, 400, "max_model_len"),
    ],
)
def test_bad_input_gets_openais_error(
    fields: dict[str, Any], status: int, words: str, client: httpx.Client
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields

    response = client.post("/v1/chat/completions", json=body)

    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == status
    assert words in error["message"]


def test_an_id_that_cannot_be_carried_is_refused(client: httpx.Client) -> None:
    response = client.post(
        "/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
        headers={"X-Request-Id": "x" * 300},
    )

    assert response.status_code == 400
    assert "X-Request-Id" in response.json()["error"]["message"]


def test_two_choices_of_one_request_differ_by_their_seeds(client: httpx.Client) -> None:
    def texts(**fields: Any) -> list[str]:
        body = {"model": MODEL, "prompt": "The sea is", "temperature": 1.0, "max_tokens": 12}
        response = client.post("/v1/completions", json=body | fields).json()
        return [choice["text"] for choice in response["choices"]]

    both = texts(n=2, seed=3)

    assert len(set(both)) == 2
    # vLLM gives the second choice the next seed.
    assert both == texts(seed=3) + texts(seed=4)


def test_malformed_json_gets_openais_error(client: httpx.Client) -> None:
    response = client.post(
        "/v1/chat/completions", content="{bad", headers={"content-type": "application/json"}
    )

    assert response.status_code in (400, 422)
    assert "JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_transfer_params", {"pdtasks": {"load": {"fingerprint": "0" * 16}, "resume": [1]}}),
        ("kv_transfer_params", {"prompt_token_ids": [1, 2, 3]}),
        ("vllm_xargs", {"kv_transfer_params": "x"}),
    ],
)
def test_a_client_cannot_name_somebody_elses_kv(
    client: httpx.Client, name: str, value: dict[str, Any]
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], name: value}

    for path in ("/v1/chat/completions", "/v1/jobs"):
        response = client.post(path, json=body)

        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


@pytest.fixture
def api_without_workers(stack: Stack, nursery: Nursery, tmp_path: Path) -> Iterator[str]:
    """An API on another database of the bus, where no worker has announced itself."""
    (port,) = free_ports(1)
    bus = stack.operator_url("bus").rpartition("/")[0] + "/1"
    argv = [sys.executable, "-m", "pdtasks.cli", "api", "--port", str(port)]
    with (tmp_path / "api.log").open("w") as log:
        api = nursery.start(argv, stack.env | {"PDTASKS_BUS_URL": bus}, log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            api.terminate()
            api.wait(timeout=40)


def test_without_a_worker_the_answer_is_503_with_the_reason(api_without_workers: str) -> None:
    def it_answers() -> bool:
        return http_status(api_without_workers + "/health") == 200

    wait_until(it_answers, 90)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    for stream in (False, True):
        started = time.monotonic()

        response = httpx.post(
            api_without_workers + "/v1/chat/completions", json=body | {"stream": stream}
        )

        assert response.status_code == 503
        assert "no prefill worker is alive" in response.json()["error"]["message"]
        assert time.monotonic() - started < 5


def test_the_api_process_holds_no_engine(stack: Stack) -> None:
    api, _ = [s for s in stack.status()["services"] if s["role"] == "api"]
    files = Path(f"/proc/{api['pid']}/maps").read_text()

    assert "model.safetensors" not in files
    assert "EngineCore" not in "".join(c.name() for c in psutil.Process(api["pid"]).children())
