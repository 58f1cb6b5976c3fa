"""Odd requests get an answer that says what is wrong, whatever came before, and leave nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.acceptance.running_stack import MODEL, Stack, ask
from tests.waiting import wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PLAIN = {"model": MODEL, "prompt": "hi", "max_tokens": 4}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN}
LOOP = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
HUGE = 2**70


def send(client: httpx.Client, path: str, body: Any, **headers: str) -> httpx.Response:
    """As a program would that escapes all but ASCII."""
    content = body if isinstance(body, str) else json.dumps(body)
    return client.post(
        path, content=content, headers={"Content-Type": "application/json"} | headers
    )


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """OpenAI's error object."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


@pytest.fixture(params=["fresh", "after another"])
def whatever_came_before(request: pytest.FixtureRequest, client: httpx.Client) -> None:
    """An engine's first structured request decides about all others, if nobody takes care."""
    if request.param == "after another":
        structured = {"structured_outputs": {"choice": ["yes", "no"]}}
        assert send(client, "/v1/completions", PLAIN | structured).status_code == 200


@pytest.mark.usefixtures("whatever_came_before")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"structured_outputs": 5}, "structured_outputs"),
        ({"structured_outputs": "x"}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs"),
        ({"structured_outputs": {"json": LOOP}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"items": [{"type": "string"}]}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ],
)
@pytest.mark.parametrize("path", [*PATHS, "/v1/jobs"])
def test_an_answer_that_cannot_be_is_refused_by_name(
    client: httpx.Client, path: str, fields: dict[str, Any], named: str
) -> None:
    error = error_of(send(client, path, PATHS.get(path, PLAIN) | fields), 400)

    assert named in error["message"]
    assert error["param"] == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": "\ud800"}, "model"),
        ({"stop": "\ud800"}, "stop"),
        ({"top_k": 2**64}, "top_k"),
        ({"bad_words": ["\udfff"]}, "bad_words.0"),
        (
            {
                "repetition_detection": {
                    "max_pattern_size": HUGE,
                    "min_pattern_size": 1,
                    "min_count": HUGE,
                }
            },
            "repetition_detection",
        ),
    ],
)
@pytest.mark.parametrize("path", [*PATHS, "/v1/jobs"])
def test_what_no_message_can_carry_is_refused_by_name_and_nothing_stays(
    client: httpx.Client, stack: Stack, path: str, fields: dict[str, Any], named: str
) -> None:
    jobs = client.get("/v1/jobs").json()["data"]

    error = error_of(send(client, path, PATHS.get(path, PLAIN) | fields), 400)

    assert named in error["message"]
    # Nothing is stored, and the list goes on
    assert client.get("/v1/jobs").json()["data"] == jobs
    # and nobody works for nobody
    wait_until(lambda: not any(w.active for w in stack.workers()))
    assert "pdtasks_api_leaks_total 0.0" in client.get("/metrics").text


def test_half_of_a_pair_in_a_message_is_named_by_its_path(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "fine"}, {"role": "user", "content": "a\udc00b"}]

    error = error_of(send(client, "/v1/chat/completions", CHAT | {"messages": messages}), 400)

    assert error["param"] == "messages.1.content"


def test_whole_pairs_are_text(client: httpx.Client) -> None:
    assert send(client, "/v1/completions", PLAIN | {"prompt": "🙂"}).status_code == 200


@pytest.mark.parametrize("path", [*PATHS, "/v1/jobs"])
@pytest.mark.parametrize("depth", [953, 5000])
def test_a_body_that_is_nested_too_deeply_is_refused(
    client: httpx.Client, path: str, depth: int
) -> None:
    error_of(send(client, path, "[" * depth + "]" * depth), 400)


@pytest.mark.parametrize("path", [*PATHS, "/v1/jobs"])
def test_a_large_body_is_refused_on_every_route(client: httpx.Client, path: str) -> None:
    def parts() -> Iterator[bytes]:  # without a length that could be known before
        for _ in range(50):
            yield b"x" * 100_000

    for content in (b"x" * 5_000_000, parts()):
        response = client.post(path, content=content)

        assert "PDTASKS_MAX_BODY_BYTES" in error_of(response, 413)["message"]


@pytest.mark.parametrize("path", [*PATHS, "/v1/jobs"])
def test_a_prompt_that_fills_the_context_is_called_so(client: httpx.Client, path: str) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": [5] * 2048}
    if path == "/v1/chat/completions":
        body = CHAT | {"messages": [{"role": "user", "content": "word " * 5000}]}

    error = error_of(send(client, path, body), 400)

    assert "context" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/jobs?limit=x", 400)],
)
def test_the_frameworks_errors_look_like_all_others(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    error_of(client.request(method, path), status)


def test_an_id_is_measured_in_bytes(client: httpx.Client) -> None:
    def status(name: bytes) -> int:
        headers = [(b"Content-Type", b"application/json"), (b"X-Request-Id", name)]
        return client.post(
            "/v1/completions", content=json.dumps(PLAIN), headers=headers
        ).status_code

    # (HTTP reads headers as Latin-1: two bytes become two characters, of two bytes each)
    assert status("é".encode() * 40) == 200
    assert status("é".encode() * 75) == 400


@pytest.mark.parametrize("stop", [[" "], ["3"], ["no such text", "e"]])
def test_the_report_is_there_when_a_stop_string_has_ended_the_answer(
    client: httpx.Client, stop: list[str], request: pytest.FixtureRequest
) -> None:
    name = f"stop-{abs(hash(tuple(stop)))}"

    body = ask(client, "Count from one to ten.", name, max_tokens=60, stop=stop)

    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["stages"]["prefill"]["prompt_tokens"] > 0


# -- text that begins inside a character ---------------------------------------------------------


def _tokens(client: httpx.Client, text: str) -> list[int]:
    ids: list[int] = client.post("/tokenize", json={"model": MODEL, "prompt": text}).json()[
        "tokens"
    ]
    return ids


def _text(client: httpx.Client, ids: list[int]) -> str:
    text: str = client.post("/detokenize", json={"model": MODEL, "tokens": ids}).json()["prompt"]
    return text


@pytest.mark.parametrize("text", ["The price is 5 日本", "x🙂 y"])
def test_an_answers_text_is_new_text_wherever_the_prompt_ends(
    client: httpx.Client, text: str
) -> None:
    ids = _tokens(client, text)
    inside = 0
    for end in range(1, len(ids) + 1):
        fields = {"prompt": ids[:end], "temperature": 0, "return_token_ids": True}
        (choice,) = send(client, "/v1/completions", PLAIN | fields).json()["choices"]

        whole = _text(client, ids[:end] + choice["token_ids"]).rstrip("\ufffd")
        prompt = _text(client, ids[:end])
        inside += prompt.endswith("\ufffd")
        assert prompt.rstrip("\ufffd") + choice["text"] == whole
    assert inside


# -- jobs ----------------------------------------------------------------------------------------


def finished(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    def it_has_ended() -> dict[str, Any] | None:
        found: dict[str, Any] = client.get(f"/v1/jobs/{job['id']}").json()
        return found if found["state"] in ("succeeded", "failed", "cancelled") else None

    ended: dict[str, Any] = wait_until(it_has_ended, 30)
    return ended


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_web_page_cannot_start_jobs(client: httpx.Client, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}

    response = client.post("/v1/jobs", content=json.dumps(PLAIN), headers=headers)

    assert "application/json" in error_of(response, 415)["message"]


def test_how_a_job_is_streamed_is_none_of_its_callers_business(client: httpx.Client) -> None:
    response = send(client, "/v1/jobs", PLAIN | {"stream_options": {"include_usage": False}})

    assert response.status_code == 202
    assert finished(client, response.json())["state"] == "succeeded"


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"prompt": "word " * 3000}, 400, "maximum context length"),
        ({"temperature": -1}, 400, "temperature"),
        ({"model": "another"}, 404, "another"),
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
    ],
)
def test_what_can_be_known_of_a_job_is_said_before_it_is_taken(
    client: httpx.Client, fields: dict[str, Any], status: int, words: str
) -> None:
    assert words in error_of(send(client, "/v1/jobs", PLAIN | fields), status)["message"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_the_events_of_a_job_are_no_job(client: httpx.Client, method: str) -> None:
    job = send(client, "/v1/jobs", PLAIN).json()

    error_of(client.request(method, f"/v1/jobs/{job['id']}:events"), 404)


def test_events_begin_where_the_last_one_was_or_say_that_there_is_none(
    client: httpx.Client,
) -> None:
    job = finished(client, send(client, "/v1/jobs", PLAIN).json())
    path = f"/v1/jobs/{job['id']}/events"
    whole = client.get(path)

    assert client.get(path, headers={"Last-Event-ID": ""}).text == whole.text
    for odd in ("99999999999999999999999-0", "x", "5", "1-1-1", "-"):
        error_of(client.get(path, headers={"Last-Event-ID": odd}), 400)
    # and no proxy keeps anything back
    assert whole.headers["Cache-Control"] == "no-cache"
    assert whole.headers["X-Accel-Buffering"] == "no"


def test_the_same_key_and_meaning_give_the_same_job(client: httpx.Client) -> None:
    def job(key: str = "a key of test_odd_requests", **fields: Any) -> httpx.Response:
        return send(client, "/v1/jobs", PLAIN | fields, **{"Idempotency-Key": key})

    first = job(temperature=0).json()["id"]

    assert job(temperature=0.0, max_tokens=4.0).json()["id"] == first
    assert job(temperature=0, user=None).json()["id"] == first
    error_of(job(temperature=0, timeout=5), 409)
    error_of(job(temperature=1), 409)
    error_of(job(key=""), 400)
