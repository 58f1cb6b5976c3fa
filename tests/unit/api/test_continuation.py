"""Does a second run's stream go on where the first one ended?"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.continuation import AnswerDiffers, Continuation

TEXT = "The capital of France is Paris."


def a_chunk(text: str, index: int = 0, **choice: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": index, "delta": {"content": text}, **choice}]}


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    starts = [0, *ends[:-1]]
    return [text[a:b] for a, b in zip(starts, ends, strict=True)]


def content(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def rest_of(continuation: Continuation, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rest for chunk in chunks if (rest := continuation.rest(chunk)) is not None]


@given(
    st.text(max_size=30),
    st.lists(st.integers(0, 30)),
    st.lists(st.integers(0, 30)),
    st.integers(0, 10),
)
def test_both_runs_together_give_the_text_once(
    text: str, first_cuts: list[int], second_cuts: list[int], lost_after: int
) -> None:
    published = [a_chunk(piece) for piece in pieces(text, first_cuts)][:lost_after]
    again = [a_chunk(piece) for piece in pieces(text, second_cuts)]

    rest = rest_of(Continuation(published), again)

    assert content(published) + content(rest) == text


def test_without_a_first_run_nothing_is_touched() -> None:
    chunk = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}

    assert Continuation([]).rest(chunk) is chunk


def test_what_brings_nothing_new_is_dropped_but_the_end_and_the_usage_are_not() -> None:
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    usage: dict[str, Any] = {"choices": [], "usage": {"total_tokens": 9}}
    end = a_chunk("", finish_reason="stop")
    continuation = Continuation([role, a_chunk(TEXT)])

    rest = rest_of(continuation, [role, a_chunk(TEXT), end, usage])

    assert rest == [end, usage]


def test_each_choice_has_its_own_place() -> None:
    continuation = Continuation([a_chunk("ab", 0), a_chunk("x", 1)])

    rest = rest_of(continuation, [a_chunk("abc", 0), a_chunk("xyz", 1)])

    assert (content(rest, 0), content(rest, 1)) == ("c", "yz")


def test_logprobs_are_dropped_with_their_tokens() -> None:
    def with_logprobs(text: str, *tokens: str) -> dict[str, Any]:
        return a_chunk(text, logprobs={"content": [{"token": t, "logprob": -1.0} for t in tokens]})

    continuation = Continuation([with_logprobs("ab", "a", "b")])

    (rest,) = rest_of(continuation, [with_logprobs("a", "a"), with_logprobs("bc", "b", "c")])

    assert content([rest]) == "c"
    assert [entry["token"] for entry in rest["choices"][0]["logprobs"]["content"]] == ["c"]


def test_a_completions_text_is_continued_as_well() -> None:
    def piece(text: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "text": text, "finish_reason": None}]}

    rest = rest_of(Continuation([piece("ab")]), [piece("a"), piece("bc")])

    assert [chunk["choices"][0]["text"] for chunk in rest] == ["c"]


def test_a_tool_call_keeps_its_first_name_and_gets_the_rest_of_its_arguments() -> None:
    def call(call_id: str | None, arguments: str) -> dict[str, Any]:
        named = {} if call_id is None else {"id": call_id, "type": "function"}
        function = {"arguments": arguments} | ({} if call_id is None else {"name": "weather"})
        return {"index": 0, **named, "function": function}

    def chunk(call_id: str | None, arguments: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": {"tool_calls": [call(call_id, arguments)]}}]}

    published = [chunk("first", ""), chunk(None, '{"city":')]

    rest = rest_of(Continuation(published), [chunk("second", ""), chunk(None, '{"city": "Rome"}')])

    assert rest == [chunk(None, ' "Rome"}')]


def test_a_tool_call_that_was_not_begun_comes_whole() -> None:
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}
    chunk = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}

    assert rest_of(Continuation([a_chunk("Well. ")]), [a_chunk("Well. "), chunk]) == [chunk]


def test_another_answer_is_no_continuation() -> None:
    continuation = Continuation([a_chunk("Paris")])

    with pytest.raises(AnswerDiffers):
        continuation.rest(a_chunk("Prague"))
