"""Is the table of a GPU's times in order?"""

from __future__ import annotations

import itertools

import pytest

from pdtasks.bench.scale.gpu import H200


def test_more_prompt_tokens_take_longer_and_lie_between_those_that_were_measured() -> None:
    times = [H200.prompt_step_s(tokens) for tokens in (64, 100, 128, 600, 2048, 3000, 5000, 8192)]

    assert all(shorter < longer for shorter, longer in itertools.pairwise(times))
    middle = (H200.prompt_step_s(2048) + H200.prompt_step_s(5000)) / 2
    assert H200.prompt_step_s((2048 + 5000) // 2) == pytest.approx(middle)


def test_a_step_of_one_answer_takes_what_one_token_took() -> None:
    # ITL p50 of 128/20, one at a time, in 2026-11-30-h200x2-4d57b95-a.json: 4.92 ms.
    assert H200.step_of(0, 1, 140, 0, saves=False) == pytest.approx(0.00492, rel=0.05)


def test_a_step_of_64_answers_takes_what_it_took() -> None:
    # The same file, 200/500, 64 at once: ITL p50 6.39 ms; 450 tokens each in the middle.
    assert H200.step_of(0, 64, 64 * 450, 0, saves=False) == pytest.approx(0.00639, rel=0.05)


def test_full_engines_do_so_many_requests() -> None:
    step = H200.step_of(0, 128, 128 * 5125, 0, saves=False)

    assert H200.answers_per_s(5000, 250) == pytest.approx(128 / (250 * step))
    per_token = H200.prompt_step_s(8192) / 8192
    assert H200.prompts_per_s(5000) == pytest.approx(1 / (H200.saving * 5000 * per_token))
