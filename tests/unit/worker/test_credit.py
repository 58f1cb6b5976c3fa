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
        values: dict[str, Any] = {"step_tokens": 8192, "kv_tokens": 100_000}
        self.credit = Credit(
            slots, on_change=self.change, clock=lambda: self.now, **values | options
        )

    def change(self) -> None:
        self.changes += 1

    def begin(self, stage: str, *prompts: int) -> list[str]:
        runs = []
        for tokens in prompts:
            self.count += 1
            runs.append(f"r{self.count}")
            self.credit.begins(stage, runs[-1], tokens)
        return runs

    def pass_through(self, stage: str, prompts: int, tokens: int, answer: int = 0) -> None:
        """So many, one after the other, two seconds each."""
        for _ in range(prompts):
            (run,) = self.begin(stage, tokens)
            self.now += 2.0
            self.credit.ends(stage, run, tokens + answer)

    @property
    def prefill(self) -> int:
        return self.credit.of["prefill"]

    @property
    def decode(self) -> int:
        return self.credit.of["decode"]


def test_long_prompts_are_taken_as_far_as_they_fill_two_steps() -> None:
    holding = Holding()
    holding.begin("prefill", *[5000] * 9)
    assert (holding.prefill, holding.changes) == (4, 1), "16,384 tokens and more"


def test_prompts_that_wait_for_their_hand_over_keep_the_engine_from_nothing() -> None:
    holding = Holding()
    runs = holding.begin("prefill", *[5000] * 4)
    holding.credit.computed("prefill", runs[0])
    assert holding.prefill == 8
    for run in runs[1:]:
        holding.credit.computed("prefill", run)
    holding.begin("prefill", *[5000] * 4)
    assert holding.prefill == 8, "four wait, four are to be computed"
    assert holding.changes == 2


def test_short_prompts_are_taken_at_once_as_soon_as_all_credit_is_used() -> None:
    holding = Holding()
    holding.begin("prefill", 200)
    assert holding.prefill == 2
    holding.begin("prefill", 200)
    assert holding.prefill == 64, "82, but for the engine's places"
    assert holding.changes == 1


def test_short_prompts_behind_long_ones_are_taken_at_once() -> None:
    holding = Holding()
    holding.pass_through("prefill", 20, 5000)
    assert holding.prefill == 2, "there was never more to do"
    holding.begin("prefill", *[100] * 6)
    assert holding.prefill == 64


def test_credit_is_taken_back_now_and_then_when_prompts_are_long() -> None:
    holding = Holding()
    for run in holding.begin("prefill", *[100] * 6):
        holding.credit.ends("prefill", run, 101)
    assert holding.prefill == 64

    changes = holding.changes
    holding.pass_through("prefill", 40, 8000)
    assert holding.prefill <= 4
    assert holding.changes - changes < 8, "each is a new consumer"


def test_less_is_taken_only_when_little_is_held() -> None:
    # RabbitMQ does not count what the consumer before was given.
    holding = Holding()
    holding.begin("prefill", *[100] * 6)
    assert holding.prefill == 64
    holding.now += 10.0
    runs = holding.begin("prefill", *[9000] * 20)
    assert holding.prefill == 0, "nothing for now"

    for number in range(1, 7):
        holding.credit.ends("prefill", f"r{number}", 101)
    for run in runs[:-4]:
        assert holding.prefill == 0
        holding.credit.ends("prefill", run, 9001)
    for run in runs[-4:]:
        holding.credit.ends("prefill", run, 9001)
    assert holding.prefill == 2


def test_a_worker_that_takes_nothing_for_now_does_so_again_when_all_has_ended() -> None:
    holding = Holding(kv_tokens=1000)
    holding.begin("decode", *[10] * 60)
    holding.pass_through("decode", 1, 5000)
    holding.now += 10.0
    for number in range(1, 61):
        holding.credit.ends("decode", f"r{number}", 5000)
    assert holding.decode == 1


def test_answers_are_taken_as_far_as_the_cache_has_room_for_them() -> None:
    holding = Holding()
    holding.pass_through("decode", 40, 4000, answer=500)
    assert holding.decode == 20, "of 4,500 tokens in nine tenths of 100,000"

    # and more when they are smaller again, as soon as all credit is used
    holding.pass_through("decode", 40, 400, answer=100)
    assert holding.decode == 20
    holding.begin("decode", *[400] * 20)
    assert holding.decode == 64


def test_answers_larger_than_the_cache_are_taken_one_by_one() -> None:
    holding = Holding(kv_tokens=1000)
    holding.pass_through("decode", 5, 4000)
    assert holding.decode == 1


def test_without_a_known_size_of_the_cache_answers_have_all_places() -> None:
    holding = Holding(kv_tokens=0)
    holding.pass_through("decode", 20, 4000)
    assert (holding.decode, holding.changes) == (64, 0)


def test_there_is_no_more_credit_than_places() -> None:
    holding = Holding(slots=2)
    holding.begin("prefill", 10, 10, 10)
    assert holding.credit.of == {"prefill": 2, "decode": 2}
    assert holding.changes == 0


def test_what_never_began_ends_nothing() -> None:
    holding = Holding()
    holding.credit.ends("decode", "r", 90_000)
    holding.begin("decode", 10)
    assert holding.decode == 64
