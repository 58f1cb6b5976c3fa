"""Does the proxy spread requests, and hand over as vLLM's connector wants it?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from pdtasks.bench.serving.proxy import Proxy
from tests.unit.bench.serving.stub_server import StubServer, running

ASK = {"model": "m", "prompt": [1], "max_tokens": 3, "stream": True, "min_tokens": 3}


@pytest.fixture
def servers() -> Iterator[list[StubServer]]:
    with ExitStack() as stack:
        found = [StubServer() for _ in range(3)]
        for server in found:
            server.url = stack.enter_context(running(server.app()))
        yield found


def test_servers_take_turns(servers: list[StubServer]) -> None:
    with running(Proxy([s.url for s in servers], []).app()) as url:
        answers = [httpx.post(f"{url}/v1/completions", json=ASK) for _ in range(6)]

    assert [len(s.asked) for s in servers] == [2, 2, 2]
    assert all(a.text.count('"token_ids"') == 3 and "[DONE]" in a.text for a in answers)


def test_a_prompt_is_computed_first_and_its_place_is_told_to_decode(
    servers: list[StubServer],
) -> None:
    prefill, *decode = servers
    with running(Proxy([s.url for s in decode], [prefill.url]).app()) as url:
        answer = httpx.post(f"{url}/v1/completions", json=ASK)

    assert answer.text.count('"token_ids"') == 3
    (computed,), (decoded,) = prefill.asked, decode[0].asked
    assert (computed["max_tokens"], computed["stream"]) == (1, False)
    assert computed["kv_transfer_params"]["do_remote_decode"]
    assert "min_tokens" not in computed
    assert decoded == ASK | {"kv_transfer_params": {"remote_host": prefill.url}}


def test_a_prefill_that_fails_is_told(servers: list[StubServer]) -> None:
    prefill, *decode = servers
    prefill.status = 500
    with running(Proxy([s.url for s in decode], [prefill.url]).app()) as url:
        answer = httpx.post(f"{url}/v1/completions", json=ASK)

    assert (answer.status_code, answer.json()) == (502, {"error": "no"})
    assert [s.asked for s in decode] == [[], []]


def test_a_server_that_is_gone_is_told() -> None:
    with running(Proxy(["http://127.0.0.1:1"], []).app()) as url:
        answer = httpx.post(f"{url}/v1/completions", json=ASK)
        health = httpx.get(f"{url}/health")

    assert (answer.status_code, health.status_code) == (502, 200)
