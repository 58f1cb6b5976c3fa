"""Each parameter of docs/api.md does what it does in vLLM: the same body, the same answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from pdtasks.cluster.probes import free_ports, http_status
from tests.acceptance.nursery import Nursery
from tests.acceptance.parameter_cases import CASES, FLAGS, REASONING, in_company
from tests.acceptance.reference import TIMEOUT_S, Reference, said
from tests.acceptance.running_stack import MODEL, Stack
from tests.waiting import wait_until

BUDGETS = ("a budget", "a budget that is spent")

pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)


@pytest.fixture(scope="module")
def other_api_url(
    stack: Stack, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """An API of the same workers with the flags "reasoning"; it is starting."""
    (port,) = free_ports(1)
    flags = [*FLAGS["reasoning"].split(), "--reasoning-parser", REASONING["reasoning"]]
    argv = [sys.executable, "-m", "pdtasks.cli", "api", "--port", str(port), *flags]
    with (tmp_path_factory.mktemp("other_api") / "log").open("w") as log:
        api = nursery.start(argv, stack.env, log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            api.terminate()
            api.wait(timeout=40)


@pytest.fixture(scope="module")
def answer(stack: Stack, other_api_url: str) -> Iterator[Callable[[str], tuple[int, str]]]:
    """What the stack answers to a case: status and text."""

    def it_is_ready() -> bool:
        return http_status(other_api_url + "/ready") == 200

    urls = {"tools": stack.api_url, "reasoning": other_api_url}
    groups = {name: group for group in in_company(CASES) for name in group}
    found: dict[str, tuple[int, str]] = {}
    with stack.client() as client, ThreadPoolExecutor(8) as callers:

        def asked(name: str) -> tuple[int, str]:
            case = CASES[name]
            response = client.post(urls[case.flags] + case.path, json=case.body(MODEL))
            return response.status_code, response.text

        def answered(name: str) -> tuple[int, str]:
            if CASES[name].flags == "reasoning":
                wait_until(it_is_ready, 120)
            if name not in found:
                found.update(zip(groups[name], callers.map(asked, groups[name]), strict=True))
            return found[name]

        yield answered


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_that_of_a_single_engine(
    name: str, answer: Callable[[str], tuple[int, str]], reference: Reference
) -> None:
    case = CASES[name]
    status, text = answer(name)
    reference_status, reference_text = reference.answer(name)

    assert status == reference_status == case.status, text
    assert said(case, text) == said(case, reference_text)


def test_a_budget_is_kept_across_the_hand_over(answer: Callable[[str], tuple[int, str]]) -> None:
    texts = [json.loads(answer(name)[1])["choices"][0]["text"] for name in BUDGETS]

    assert all(" done." in text for text in texts), texts


@pytest.mark.parametrize(
    "path",
    [
        *("/inference/v1/generate", "/inference/v1/abort_requests", "/scale_elastic_ep"),
        *("/v1/embeddings", "/pooling", "/score", "/v1/audio/transcriptions"),
        "/v1/load_lora_adapter",
    ],
)
def test_what_does_not_go_through_the_stages_has_no_route(path: str, client: httpx.Client) -> None:
    body = {"model": MODEL, "input": "x", "request_ids": ["x"], "new_data_parallel_size": 2}

    response = client.post(path, json=body)

    assert response.status_code == 404
    assert response.json()["error"]["code"] == 404
