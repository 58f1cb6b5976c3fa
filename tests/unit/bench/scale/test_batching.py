"""Do requests share an engine's steps as vLLM lets them?"""

from __future__ import annotations

import pytest

from pdtasks.bench.scale.batching import Batch, Request
from pdtasks.bench.scale.gpu import Gpu

GPU = Gpu(step_tokens=1000, max_num_seqs=3)


def prompt(key: str, tokens: int, answer: int = 1) -> Request:
    return Request(key, tokens, 0, answer)


def answer(key: str, tokens: int) -> Request:
    return Request(key, 0, 100, tokens, to_load=100)


def take(batch: Batch) -> tuple[float, list[str]]:
    step = batch.begin_step()
    assert step is not None
    return step.seconds, [request.key for request in batch.end_step(step)]


def test_prompts_are_computed_in_turn_in_chunks_that_fill_each_step() -> None:
    batch = Batch(GPU)
    batch.add(prompt("a", 700))
    batch.add(prompt("b", 700))
    first = batch.begin_step()
    assert first is not None

    assert [(request.key, tokens) for request, tokens in first.prompts] == [("a", 700), ("b", 300)]
    assert [request.key for request in batch.end_step(first)] == ["a"]
    assert take(batch)[1] == ["b"]
    assert batch.begin_step() is None
    assert len(batch) == 0


def test_answers_get_a_token_in_each_step_until_they_have_all() -> None:
    batch = Batch(GPU)
    batch.add(answer("a", 2))
    batch.add(answer("b", 1))

    assert [take(batch)[1] for _ in range(2)] == [["a", "b"], ["a"]]
    assert batch.begin_step() is None


def test_a_step_with_a_prompt_is_longer_and_one_with_a_hand_over_is_too() -> None:
    batch = Batch(GPU)
    batch.add(answer("a", 9))
    with_load, _ = take(batch)
    alone, _ = take(batch)
    batch.add(prompt("b", 500, 3))
    with_prompt, made = take(batch)

    assert made == ["b", "a"]
    assert alone == pytest.approx(GPU.step_of(0, 1, 101, 0, saves=False))
    assert with_load == pytest.approx(GPU.step_of(0, 1, 100, 100, saves=False))
    assert with_prompt == pytest.approx(GPU.step_of(500, 1, 102, 0, saves=False))
    assert alone < with_load < with_prompt


def test_no_more_run_than_there_are_places() -> None:
    batch = Batch(GPU)
    for key in "abcd":
        batch.add(answer(key, 2))

    assert [take(batch)[1] for _ in range(3)] == [["a", "b", "c"], ["a", "b", "c"], ["d"]]


def test_who_is_forgotten_during_a_step_gets_nothing_of_it() -> None:
    batch = Batch(GPU)
    batch.add(answer("a", 5))
    batch.add(prompt("b", 10))
    step = batch.begin_step()
    assert step is not None
    batch.remove("a")
    batch.remove("b")

    assert batch.end_step(step) == []
    assert batch.begin_step() is None
