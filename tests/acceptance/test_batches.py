"""OpenAI's own client: files, batches, and responses in the background, on the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.acceptance.running_stack import MODEL, Stack
from tests.waiting import wait_until

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def official(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.api_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def a_line(custom_id: str, **changes: object) -> str:
    body = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 8} | changes
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line)


def test_a_batch_gives_what_its_requests_would_give(official: openai.OpenAI) -> None:
    direct = official.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=8,
    )
    lines = [
        a_line("plain"),
        a_line("two", n=2, seed=1, temperature=0.5),
        a_line("wrong", temperature=-1),
    ]
    lines.append(a_line("long", messages=[{"role": "user", "content": "word " * 5000}]))
    file = official.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    made = official.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"for": "a test"},
    )

    wait_until(lambda: official.batches.retrieve(made.id).status == "completed", 60)

    batch = official.batches.retrieve(made.id)
    assert batch.metadata == {"for": "a test"}
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
    assert batch.output_file_id
    assert batch.error_file_id
    output = official.files.content(batch.output_file_id).text.splitlines()
    answers = {o["custom_id"]: o["response"]["body"] for o in map(json.loads, output)}
    assert answers["plain"]["choices"][0]["message"]["content"] == direct.choices[0].message.content
    assert len(answers["two"]["choices"]) == 2
    errors = official.files.content(batch.error_file_id).text.splitlines()
    told = {o["custom_id"]: o["response"] for o in map(json.loads, errors)}
    assert {name: response["status_code"] for name, response in told.items()} == {
        "wrong": 400,
        "long": 400,
    }
    assert "context" in told["long"]["body"]["error"]["message"]
    assert next(b.id for b in official.batches.list(limit=1)) == made.id
    assert {f.id for f in official.files.list()} >= {file.id, batch.output_file_id}
    assert official.files.delete(file.id).deleted


def test_a_bad_file_and_a_cancelled_batch(official: openai.OpenAI) -> None:
    file = official.files.create(file=("in.jsonl", b"no json"), purpose="batch")
    made = official.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    wait_until(lambda: official.batches.retrieve(made.id).status == "failed")
    errors = official.batches.retrieve(made.id).errors
    assert errors is not None
    assert errors.data is not None
    assert [(e.line, e.code) for e in errors.data] == [(1, "invalid_json_line")]

    lines = [a_line(str(n), max_tokens=300, min_tokens=300) for n in range(20)]
    file = official.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    made = official.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    wait_until(lambda: official.batches.retrieve(made.id).status == "in_progress")
    assert official.batches.cancel(made.id).status in ("cancelling", "cancelled")
    wait_until(lambda: official.batches.retrieve(made.id).status == "cancelled")
    counts = official.batches.retrieve(made.id).request_counts
    assert counts is not None
    assert counts.failed + counts.completed == 20


def test_a_response_in_the_background_is_a_job(official: openai.OpenAI, stack: Stack) -> None:
    made = official.responses.create(
        model=MODEL,
        input="What is the capital of France?",
        background=True,
        temperature=0,
        max_output_tokens=20,
    )
    assert made.status in ("queued", "in_progress")
    assert made.background

    def it_has_ended() -> bool:
        return official.responses.retrieve(made.id).status in ("completed", "incomplete")

    wait_until(it_has_ended)
    found = official.responses.retrieve(made.id)
    direct = official.responses.create(
        model=MODEL, input="What is the capital of France?", temperature=0, max_output_tokens=20
    )
    assert found.id == made.id
    assert found.background
    assert found.output_text == direct.output_text
    assert found.usage is not None
    assert found.usage.output_tokens > 0

    long = official.responses.create(
        model=MODEL,
        input="Tell me a long story about a river.",
        background=True,
        max_output_tokens=1500,
    )
    assert official.responses.cancel(long.id).status == "cancelled"
    assert official.responses.retrieve(long.id).status == "cancelled"
    wait_until(lambda: all(w.kv_usage == 0 for w in stack.workers()))

    for response_id in ("resp_" + "0" * 32, "resp_x", direct.id):
        with pytest.raises(openai.NotFoundError):
            official.responses.retrieve(response_id)
    for refused in (
        {"previous_response_id": made.id},
        {"stream": True},
        {"store": False},
        {"extra_body": {"model": "other"}},
    ):
        with pytest.raises(openai.APIStatusError) as told:
            official.responses.create(
                **({"model": MODEL, "input": "hi", "background": True} | refused)  # type: ignore[call-overload]  # as a dictionary
            )
        assert told.value.status_code in (400, 404)
