"""How many jobs does a worker take at once?"""

from __future__ import annotations

from typing import Any

from pdtasks.worker.credit import Credit


class Holding:
    """A worker's credit, by a clock that a test moves."""

    def __init__(self, slots: int = 64, **options: Any) -> None:
        self.now = 100.0
        self.changes = 0
        self.count = 0
        values: dict[str, Any] = {"step_tokens": 8192}
        self.credit = Credit(
            slots, on_change=self.change, clock=lambda: self.now, **values | options
        )

    def change(self) -> None:
        self.changes += 1

    def begin(self, *prompts: int, stage: str = "prefill") -> list[str]:
        runs = []
        for tokens in prompts:
            self.count += 1
            runs.append(f"r{self.count}")
            self.credit.begins(stage, runs[-1], tokens)
        return runs

    def end(self, *runs: str) -> None:
        for run in runs:
            self.credit.ends(run)

    def pass_through(self, prompts: int, tokens: int) -> None:
        """So many, one after the other, two seconds each."""
        for _ in range(prompts):
            runs = self.begin(tokens)
            self.now += 2.0
            self.end(*runs)

    @property
    def prefill(self) -> int:
        return self.credit.of["prefill"]


def test_long_prompts_are_taken_as_far_as_they_fill_two_steps() -> None:
    holding = Holding()
    holding.begin(*[5000] * 9)
    assert (holding.prefill, holding.changes) == (4, 1), "16,384 tokens and more"


def test_prompts_that_wait_for_their_hand_over_keep_the_engine_from_nothing() -> None:
    holding = Holding()
    runs = holding.begin(*[5000] * 4)
    holding.credit.computed(runs[0])
    assert holding.prefill == 8
    for run in runs[1:]:
        holding.credit.computed(run)
    holding.begin(*[5000] * 4)
    assert holding.prefill == 8, "four wait, four are to be computed"
    assert holding.changes == 2


def test_short_prompts_are_taken_at_once_as_soon_as_all_credit_is_used() -> None:
    holding = Holding()
    holding.begin(200)
    assert holding.prefill == 2
    holding.begin(200)
    assert holding.prefill == 64, "82, but for the engine's places"
    assert holding.changes == 1


def test_short_prompts_behind_long_ones_are_taken_at_once() -> None:
    holding = Holding()
    holding.pass_through(20, 5000)
    assert holding.prefill == 2, "there was never more to do"
    holding.begin(*[100] * 6)
    assert holding.prefill == 64


def test_credit_is_taken_back_only_when_nothing_is_held() -> None:
    # RabbitMQ would not count what the consumer before was given.
    holding = Holding()
    holding.end(*holding.begin(*[100] * 6))
    assert holding.prefill == 64

    holding.now += 10.0
    runs = holding.begin(*[9000] * 30)
    assert holding.prefill == 64
    holding.end(*runs[:-1])
    assert holding.prefill == 64
    holding.end(runs[-1])
    assert holding.prefill < 32


def test_credit_is_taken_back_now_and_then() -> None:
    holding = Holding()
    holding.end(*holding.begin(*[100] * 6))
    changes = holding.changes
    holding.pass_through(40, 8000)
    assert holding.prefill <= 6
    assert holding.changes - changes < 8, "each is a new consumer"


def test_answers_have_all_places() -> None:
    holding = Holding()
    holding.end(*holding.begin(*[90_000] * 80, stage="decode"))
    assert (holding.credit.of["decode"], holding.changes) == (64, 0)


def test_there_is_no_more_credit_than_places() -> None:
    holding = Holding(slots=2)
    holding.begin(10, 10, 10)
    assert holding.credit.of == {"prefill": 2, "decode": 2}
    assert holding.changes == 0


def test_what_never_began_ends_nothing() -> None:
    holding = Holding()
    holding.credit.ends("r")
    holding.credit.computed("r")
    assert (holding.prefill, holding.changes) == (2, 0)
