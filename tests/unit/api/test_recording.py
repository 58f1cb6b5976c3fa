"""Is a recorded answer the one that was streamed?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from api.recording import RecordingLLM, Tape, using


def a_delta(text: str, *token_ids: int, index: int = 0, prompt: bool = False) -> RequestOutput:
    completion = CompletionOutput(
        index=index,
        text=text,
        token_ids=list(token_ids),
        cumulative_logprob=None,
        logprobs=[{token: None} for token in token_ids],  # type: ignore[dict-item]
    )
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[7, 8] if prompt else None,
        prompt_logprobs=None,
        outputs=[completion],
        finished=False,
        num_cached_tokens=2 if prompt else None,
    )


async def stream(deltas: list[RequestOutput]) -> Any:
    for delta in deltas:
        yield delta


def recorded(deltas: list[RequestOutput]) -> RequestOutput:
    async def run() -> RequestOutput:
        tape = Tape()
        passed = [output async for output in tape.record("r", stream(deltas))]
        assert passed == deltas
        (whole,) = [output async for output in tape.play("r")]
        return whole

    return asyncio.run(run())


def test_deltas_become_one_output_with_the_facts_of_the_first() -> None:
    whole = recorded([a_delta("a", 1, prompt=True), a_delta("bc", 2, 3), a_delta("", 4)])

    (completion,) = whole.outputs
    assert (completion.text, list(completion.token_ids)) == ("abc", [1, 2, 3, 4])
    assert len(completion.logprobs or ()) == 4
    assert (whole.prompt_token_ids, whole.num_cached_tokens) == ([7, 8], 2)


def test_the_choices_come_in_their_order() -> None:
    whole = recorded([a_delta("x", 1, index=1, prompt=True), a_delta("a", 2), a_delta("b", 3)])

    assert [(c.index, c.text) for c in whole.outputs] == [(0, "ab"), (1, "x")]


def test_what_was_passed_on_is_not_changed_by_what_follows() -> None:
    deltas = [a_delta("a", 1, prompt=True), a_delta("b", 2)]

    recorded(deltas)

    assert [(d.outputs[0].text, list(d.outputs[0].token_ids)) for d in deltas] == [
        ("a", [1]),
        ("b", [2]),
    ]


def test_playing_needs_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("api.client.PipelineLLM.check_admission", lambda *args: asked.append(args))
    client = RecordingLLM.__new__(RecordingLLM)
    tape = Tape()

    with using(tape):
        client.check_admission()
        tape.is_full = True
        client.check_admission()

    assert len(asked) == 1
