"""A prompt that is too short to be handed over is computed by the worker that answers it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.acceptance.exact_cases import CASES
from tests.acceptance.reference import TIMEOUT_S, Reference, said
from tests.acceptance.running_stack import MODEL

WHOLE = {"X-Pdtasks-Route": "whole"}

pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)


def report(client: httpx.Client, name: str) -> tuple[dict[str, Any], str]:
    """What the stages did, and which way it went."""
    found = client.get(f"/pdtasks/requests/{name}").raise_for_status().json()
    return found["sequences"][0], found["times"][0]["route"]


def test_the_shortest_prompt_takes_the_short_way_and_says_why(client: httpx.Client) -> None:
    name = "short-1"
    body = {"model": MODEL, "prompt": [1], "max_tokens": 4, "ignore_eos": True}

    response = client.post("/v1/completions", json=body, headers={"X-Request-Id": name})

    assert response.json()["usage"]["completion_tokens"] == 4
    stages, route = report(client, f"cmpl-{name}")
    assert route == "short_prompt"
    assert set(stages) == {"decode"}
    assert (stages["decode"]["is_whole"], stages["decode"]["output_tokens"]) == (True, 4)


@pytest.mark.parametrize("name", [*CASES][::3])
def test_tokens_and_logprobs_equal_a_single_engines(
    name: str, client: httpx.Client, reference: Reference
) -> None:
    case = CASES[name]
    request_id = f"whole-{list(CASES).index(name)}"

    # Of its own KV: other tests count what is computed and loaded of these prompts.
    body = case.body(MODEL) | {"cache_salt": "whole"}
    headers = {"X-Request-Id": request_id} | WHOLE
    response = client.post(case.path, json=body, headers=headers)
    status, text = reference.answer(name)

    assert response.status_code == status == 200, response.text
    assert said(case, response.text) == said(case, text)
    assert json.loads(response.text)["usage"] == json.loads(text)["usage"]
    stages, route = report(client, f"chatcmpl-{request_id}")
    assert (set(stages), route) == ({"decode"}, "wished")


def test_the_metrics_say_how_many_went_which_way(client: httpx.Client) -> None:
    def count() -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith("pdtasks_routes_total{") and 'route="short_prompt"' in line
        )

    before = count()
    body = {"model": MODEL, "prompt": [1], "max_tokens": 2}
    # (Two API processes answer on one port, each with counts of its own.)
    while count() == before:
        client.post("/v1/completions", json=body).raise_for_status()
