"""Which parameters are refused, and with which sentence, before any route?"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.middleware import Middleware

from api.guard import Guard
from api.parameters import MODELS, ONLY_RENDERED, REFUSED, UNKNOWN, Parameters

PATHS = [*MODELS, "/v1/jobs", "/invocations", "/v1/chat/completions/render"]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "canary"},
    "/v1/responses": {"input": "canary"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "canary"}]},
}
#: A value of each kind that says something.
SAID: dict[str, Any] = {
    "kv_transfer_params": {"pdtasks": {"load": {"fingerprint": "0" * 16}}},
    "vllm_xargs": {"kv_transfer_params": "x"},
    "routed_experts_prompt_start": 1,
}


@cache
def client(*, priorities: bool = False) -> TestClient:
    """Of an app that takes everything."""

    async def look() -> None:
        """Nothing to look at."""

    refuse = Parameters(priorities=priorities).refusal
    app = FastAPI(middleware=[Middleware(Guard, max_body_bytes=10_000, before=look, refuse=refuse)])

    @app.post("/{path:path}")
    async def echo(path: str, request: Request) -> Any:
        return (await request.body()).decode()

    return TestClient(app)


def refusal(
    path: str, body: Any, *, priorities: bool = False, headers: dict[str, str] | None = None
) -> Any:
    """The error; None for what goes on."""
    response = client(priorities=priorities).post(path, json=body, headers=headers)
    if response.status_code == 200:
        assert response.json() == response.request.content.decode(), "as it came"
        return None
    assert response.status_code == 400
    assert "canary" not in response.text
    return response.json()["error"]


@pytest.mark.parametrize("name", [*REFUSED, *UNKNOWN, *ONLY_RENDERED])
@pytest.mark.parametrize("path", list(ASKED))
def test_what_cannot_work_is_refused_with_its_sentence(path: str, name: str) -> None:
    sentence = {**REFUSED, **UNKNOWN, **ONLY_RENDERED}[name]

    error = refusal(path, ASKED[path] | {name: SAID.get(name, True)})

    assert error["param"] == name
    assert error["message"] == f"{name}: {sentence}"


@pytest.mark.parametrize("path", PATHS)
def test_kv_of_others_can_be_named_nowhere(path: str) -> None:
    for name in ("kv_transfer_params", "ec_transfer_params", "vllm_xargs"):
        assert refusal(path, {name: {"kv_transfer_params": "x"}})["param"] == name


@pytest.mark.parametrize("path", PATHS)
def test_a_parameter_that_nobody_knows_is_refused_by_name(path: str) -> None:
    error = refusal(path, {"temprature": 0})

    assert error["param"] == "temprature"
    assert "it would be ignored" in error["message"]


@pytest.mark.parametrize("nothing", [None, False, 0, 0.0, "", [], {}])
@pytest.mark.parametrize("name", ["use_beam_search", "watermarking", "kv_transfer_params"])
def test_what_says_nothing_is_taken(name: str, nothing: Any) -> None:
    assert refusal("/v1/completions", {"prompt": "x", name: nothing, "new": None}) is None


@pytest.mark.parametrize("path", list(ASKED))
def test_what_only_names_the_caller_is_taken(path: str) -> None:
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}

    assert refusal(path, ASKED[path] | fields) is None


def test_every_parameter_of_vllms_models_that_is_not_refused_is_taken() -> None:
    for path, model in MODELS.items():
        taken = set(model.model_fields) - set(REFUSED) - set(UNKNOWN) - set(ONLY_RENDERED)
        for name in taken - {"priority", "best_of", "tools"}:
            assert refusal(path, {name: True}) is None, name


def test_routes_of_others_may_have_any_parameter() -> None:
    assert refusal("/tokenize", {"prompt": "x", "anything": 1}) is None
    assert refusal("/v1/messages/count_tokens", {"anything": 1}) is None


def test_a_job_may_have_a_timeout() -> None:
    assert refusal("/v1/jobs", {"prompt": "x", "timeout": 5}) is None
    assert refusal("/v1/completions", {"prompt": "x", "timeout": 5})["param"] == "timeout"


def test_offsets_are_told_where_prompts_are_rendered() -> None:
    body = {"prompt": "x", "return_token_offsets": True}

    assert refusal("/v1/completions/render", body) is None


@pytest.mark.parametrize(("n", "best_of", "taken"), [(1, 1, True), (3, 3, True), (1, 3, False)])
def test_the_best_of_as_many_as_are_asked_for_is_no_choice(
    n: int, best_of: int, taken: bool
) -> None:
    error = refusal("/v1/completions", {"prompt": "x", "n": n, "best_of": best_of})

    assert (error is None) == taken


@pytest.mark.parametrize("headers", [{}, {"X-Vllm-Priority": "-5"}])
def test_a_priority_is_refused_where_engines_have_none(headers: dict[str, str]) -> None:
    body = {"prompt": "x", "priority": 0 if headers else 3}

    error = refusal("/v1/completions", body, headers=headers)

    assert error["param"] == "priority"
    assert "scheduling_policy" in error["message"]
    assert refusal("/v1/completions", body, priorities=True, headers=headers) is None
    assert refusal("/v1/completions", {"prompt": "x", "priority": 0}) is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"audio_url": {}}]}]}),
        (
            "/v1/chat/completions/batch",
            {"messages": [[{"content": "x"}, {"content": [{"type": "video_url"}]}]]},
        ),
        ("/v1/responses", {"input": [{"content": [{"type": "input_image", "image_url": "x"}]}]}),
        ("/v1/responses", {"input": [{"type": "x", "output": [{"type": "input_file"}]}]}),
        ("/v1/messages", {"messages": [{"content": [{"type": "document", "source": {}}]}]}),
        (
            "/v1/messages",
            {"messages": [{"content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
        ),
    ],
)
def test_what_is_no_text_is_refused(path: str, body: dict[str, Any]) -> None:
    error = refusal(path, body)

    assert "do not go through the two stages: send text" in error["message"]


def test_text_in_parts_and_tools_arguments_are_text() -> None:
    parts = [{"type": "text", "text": "image_url"}, {"type": ["odd"]}, "image"]
    tool = {"type": "tool_use", "input": {"content": [{"type": "image"}]}}
    deep = '[{"content": ' * 400 + "[]" + "}]" * 400

    assert refusal("/v1/chat/completions", {"messages": [{"content": parts}]}) is None
    assert refusal("/v1/messages", {"messages": [{"content": [tool]}]}) is None
    body = f'{{"messages": {deep}}}'.encode()
    assert Parameters(priorities=False).refusal("/v1/messages", {}, body) is None


@pytest.mark.parametrize("kind", ["web_search", "code_interpreter", "mcp", "file_search"])
def test_tools_that_a_server_would_run_are_refused(kind: str) -> None:
    error = refusal("/v1/responses", {"input": "x", "tools": [{"type": kind}]})

    assert error["param"] == "tools"
    assert refusal("/v1/responses", {"input": "x", "tools": [{"type": "function"}]}) is None


@pytest.mark.parametrize("content", ["", "no json", "[]", '"x"', "1", "[" * 5000, "\xff"])
def test_what_is_no_object_is_for_the_route_to_refuse(content: str) -> None:
    assert client().post("/v1/completions", content=content).status_code == 200


def test_a_refusal_of_fields_is_that_of_the_body() -> None:
    parameters = Parameters(priorities=False)
    body = {"prompt": "x", "use_beam_search": True}

    found = parameters.refusal("/v1/completions", {}, json.dumps(body).encode())

    assert found == parameters.refusal_of_fields("/v1/completions", body) is not None


def test_a_job_with_messages_and_a_prompt_is_left_to_its_route() -> None:
    assert refusal("/v1/jobs", {"messages": [], "prompt": "x"}) is None


@pytest.mark.parametrize("prompt", ['"text"', "[1, 2]", "[NaN]", "null", "7"])
def test_a_prompt_is_read_by_its_route_alone(prompt: str) -> None:
    body = f'{{"prompt": {prompt}, "lora": "a"}}'.encode()

    parameters = Parameters(priorities=False)
    taken = body.replace(b"lora", b"user")
    assert parameters.refusal("/v1/completions", {}, taken) is None
    refused = parameters.refusal("/v1/completions", {}, body)
    assert refused is not None
    assert refused.param == "lora"


def test_no_prompt_at_all_is_nothing_that_would_be_ignored() -> None:
    parameters = Parameters(priorities=False)
    for value, param in (("null", None), ('"text"', "prompt")):
        body = f'{{"messages": [], "prompt": {value}}}'.encode()
        refused = parameters.refusal("/v1/chat/completions", {}, body)
        assert (refused and refused.param) == param
