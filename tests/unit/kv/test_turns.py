"""Which prompts are computed in one step."""

from __future__ import annotations

from collections.abc import Callable

from pdtasks.kv.lookup import BlockLookup
from pdtasks.kv.turns import Turns
from tests.unit.kv.vllm_scheduler import FakeScheduler, a_request


def test_prompts_that_fill_a_step_have_one_each() -> None:
    turns = Turns(full_step=100)
    assert turns.take(90)
    assert not turns.take(90)
    turns.next_step(0)
    assert turns.take(90)


def test_short_prompts_share_a_step() -> None:
    turns = Turns(full_step=100)
    assert [turns.take(40) for _ in range(3)] == [True, True, False]


def test_a_short_prompt_goes_before_a_long_one_that_waits_for_its_turn() -> None:
    turns = Turns(full_step=100)
    assert [turns.take(n) for n in (60, 500, 30)] == [True, False, True]


def test_a_prompt_of_any_length_has_a_turn_when_no_other_has_one() -> None:
    assert Turns(full_step=100).take(5000)


def test_nobody_joins_the_rest_of_a_long_prompt_but_short_ones() -> None:
    turns = Turns(full_step=100)
    turns.take(5000)
    turns.next_step(70)
    assert [turns.take(n) for n in (50, 30)] == [False, True]


def test_without_a_limit_vllm_alone_decides() -> None:
    turns = Turns(full_step=None)
    assert all(turns.take(5000) for _ in range(9))


def test_a_prompt_to_hand_over_waits_while_a_step_is_full_and_no_longer(
    make_lookup: Callable[..., BlockLookup],
) -> None:
    lookup = make_lookup(full_step=50)
    scheduler = FakeScheduler(lookup)
    first, second = a_request(40, "a", save="t"), a_request(40, "b", save="u")
    scheduler.add(first, [1, 2, 3])
    scheduler.add(second, [4, 5, 6])

    assert lookup.num_loadable_tokens(first, 0) == 0
    assert lookup.num_loadable_tokens(second, 0) is None
    # In two chunks: the rest of the first one is in the second step
    scheduler.step({first: 16})
    assert lookup.num_loadable_tokens(second, 0) is None
    scheduler.step({first: 24})
    assert lookup.num_loadable_tokens(second, 0) == 0


def test_prompts_of_an_engine_that_answers_itself_do_not_wait(
    make_lookup: Callable[..., BlockLookup],
) -> None:
    lookup = make_lookup(full_step=50)
    for name in "ab":
        request = a_request(40, name)
        lookup.on_new_request(request)
        assert lookup.num_loadable_tokens(request, 0) == 0


def test_what_is_cached_already_takes_no_room(make_lookup: Callable[..., BlockLookup]) -> None:
    lookup = make_lookup(full_step=50)
    for name, num_computed in (("a", 32), ("b", 0)):
        request = a_request(40, name, save="t")
        lookup.on_new_request(request)
        assert lookup.num_loadable_tokens(request, num_computed) == 0
