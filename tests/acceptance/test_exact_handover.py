"""The answer of two engines equals the answer of one, to the last bit of every logprob."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.running_stack import MODEL, Stack

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 7},
    "seeded with top-k, top-p and min-p": {
        "temperature": 1.2,
        "seed": 11,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
    },
    "frequency penalty": {"temperature": 0, "frequency_penalty": 1.2},
    "presence penalty": {"temperature": 0, "presence_penalty": 1.5},
    "repetition penalty": {"temperature": 0, "repetition_penalty": 1.25},
    "seeded with penalties": {
        "temperature": 0.9,
        "seed": 3,
        "frequency_penalty": 0.8,
        "presence_penalty": 0.7,
        "repetition_penalty": 1.1,
    },
    "min tokens against an eos bias": {
        "temperature": 0,
        "min_tokens": 8,
        "logit_bias": {"2": 100.0},
    },
    "bad words": {"temperature": 0, "bad_words": ["The capital"]},
    "stop token": {"temperature": 0, "stop_token_ids": [3575, 28]},
    "JSON schema": {
        "temperature": 0,
        "structured_outputs": {
            "json": {
                "type": "object",
                "properties": {"a": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["a", "n"],
                "additionalProperties": False,
            }
        },
    },
    "regex, seeded": {
        "temperature": 1.0,
        "seed": 5,
        "structured_outputs": {"regex": "(ab|cd|ef){5}-[0-9]{4}"},
    },
    "one token": {"temperature": 0, "max_tokens": 1},
}
PROMPTS = {
    "a short prompt": "What is the capital of France?",
    "a prompt of several blocks": "Write a list of words about the sea. " * 30 + "Now begin.",
}


@pytest.fixture(scope="module")
def prompts(stack: Stack) -> dict[str, list[int]]:
    """Token ids; each case gets a first word of its own, so no prefix is cached anywhere."""
    tokens = {}
    with stack.client() as client:
        for number, (case, prompt) in enumerate((c, p) for c in CASES for p in PROMPTS):
            messages = [{"role": "user", "content": f"{number}. {PROMPTS[prompt]}"}]
            body = client.post("/tokenize", json={"model": MODEL, "messages": messages}).json()
            tokens[f"{case}/{prompt}"] = body["tokens"]
    return tokens


@pytest.fixture(scope="module")
def single_engine(
    prompts: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    cases = [
        {"prompt": tokens, "sampling": _sampling(name.split("/")[0])}
        for name, tokens in prompts.items()
    ]
    out = tmp_path_factory.mktemp("reference") / "answers.json"
    script = Path(__file__).with_name("single_engine.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        input=json.dumps(cases),
        text=True,
        check=False,
        timeout=240,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(prompts, json.loads(out.read_text()), strict=True))


def _sampling(case: str) -> dict[str, Any]:
    return {"max_tokens": 24, "logprobs": 1, **CASES[case]}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logprobs_equal_a_single_engines(
    case: str,
    prompt: str,
    client: httpx.Client,
    prompts: dict[str, list[int]],
    single_engine: dict[str, dict[str, Any]],
) -> None:
    name = f"{case}/{prompt}"
    request_id = f"exact-{list(prompts).index(name)}"

    body = client.post(
        "/v1/completions",
        json={
            "model": MODEL,
            "prompt": prompts[name],
            "return_token_ids": True,
            **_sampling(case),
        },
        headers={"X-Request-Id": request_id},
    ).json()

    choice, reference = body["choices"][0], single_engine[name]
    assert choice["token_ids"] == reference["token_ids"]
    assert choice["logprobs"]["token_logprobs"] == reference["logprobs"]
    assert choice["finish_reason"] == reference["finish_reason"]
    # Equal tokens alone prove nothing: vLLM recomputes silently.
    stages = client.get(f"/pdtasks/requests/cmpl-{request_id}").json()["sequences"][0]
    written = stages["prefill"]["kv_blocks_written"]
    if case == "one token":
        assert "decode" not in stages
        return
    assert written == -(-len(prompts[name]) // 128)
    assert stages["decode"]["kv_blocks_loaded"] == written
    assert stages["decode"]["kv_bytes_loaded"] == stages["prefill"]["kv_bytes_written"] > 0
    assert stages["decode"]["kv_blocks_recomputed"] == 0
