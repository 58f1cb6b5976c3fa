"""Do programs that others wrote for such servers work with ours?"""

from __future__ import annotations

from pathlib import Path

import anthropic

from pdtasks.bench.serving.plan import Workload
from pdtasks.bench.serving.vllm_client import run_vllm_client
from pdtasks.engine.models import resolve_model
from pdtasks.settings import make_settings
from tests.acceptance.running_stack import MODEL, Stack

QUESTION: anthropic.types.MessageParam = {
    "role": "user",
    "content": "What is the capital of France?",
}
ANSWER = "The capital of France is Paris."


def test_anthropics_client_gets_a_message_whole_and_in_pieces(stack: Stack) -> None:
    with anthropic.Anthropic(base_url=stack.api_url, api_key="none", max_retries=0) as user:
        whole = user.messages.create(
            model=MODEL, messages=[QUESTION], max_tokens=32, extra_body={"temperature": 0}
        )
        with user.messages.stream(
            model=MODEL, messages=[QUESTION], max_tokens=32, extra_body={"temperature": 0}
        ) as stream:
            pieces = list(stream.text_stream)
            streamed = stream.get_final_message()

    assert [part.text for part in whole.content if part.type == "text"] == [ANSWER]
    assert whole.stop_reason == streamed.stop_reason == "end_turn"
    assert len(pieces) > 3
    assert "".join(pieces) == ANSWER
    assert whole.usage.input_tokens == streamed.usage.input_tokens > 0
    assert whole.usage.output_tokens == streamed.usage.output_tokens > len(pieces) / 2


def test_anthropics_client_reads_our_errors(stack: Stack) -> None:
    with anthropic.Anthropic(base_url=stack.api_url, api_key="none", max_retries=0) as user:
        try:
            user.messages.create(model="another", messages=[QUESTION], max_tokens=4)
        except anthropic.NotFoundError as exc:
            body = exc.body
        else:
            raise AssertionError("there is no such model")

    assert isinstance(body, dict)
    assert "another" in body["error"]["message"]


def test_vllms_own_load_client_finds_no_fault(stack: Stack, tmp_path: Path) -> None:
    tokenizer = resolve_model(None, make_settings().cache_dir, print)
    samples, took_s = run_vllm_client(
        stack.api_url,
        MODEL,
        tokenizer,
        Workload(prompt=24, answer=6, rates=[0], requests=8),
        0,
        seed=1,
        folder=tmp_path,
        limit_s=120,
    )

    assert [sample.failure for sample in samples] == [None] * 8
    # Random tokens need not be whole characters, and several may come at once.
    assert all(1 <= len(sample.at) <= 6 for sample in samples)
    assert took_s > 0
