"""The answer of two engines equals the answer of one, to the last bit of every logprob."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.acceptance.exact_cases import CASES
from tests.acceptance.reference import TIMEOUT_S, Reference, said
from tests.acceptance.running_stack import MODEL

#: Tokens, vLLM's default on a CPU.
BLOCK = 128

pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logprobs_equal_a_single_engines(
    name: str, client: httpx.Client, reference: Reference
) -> None:
    case = CASES[name]
    request_id = f"exact-{list(CASES).index(name)}"

    response = client.post(case.path, json=case.body(MODEL), headers={"X-Request-Id": request_id})
    status, text = reference.answer(name)

    assert response.status_code == status == 200, response.text
    assert said(case, response.text) == said(case, text)
    # Equal tokens alone prove nothing: vLLM recomputes silently.
    body = json.loads(response.text)
    assert len(body["choices"][0]["logprobs"]["content"]) == body["usage"]["completion_tokens"]
    stages = client.get(f"/pdtasks/requests/chatcmpl-{request_id}").json()["sequences"][0]
    written = stages["prefill"]["kv_blocks_written"]
    if case.fields["max_tokens"] == 1:
        assert "decode" not in stages
        return
    assert written == -(-body["usage"]["prompt_tokens"] // BLOCK)
    assert stages["decode"]["kv_blocks_loaded"] == written
    assert stages["decode"]["kv_bytes_loaded"] == stages["prefill"]["kv_bytes_written"] > 0
    assert stages["decode"]["kv_blocks_recomputed"] == 0
