"""Whose turn is it, when not all can go at once?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from api.line import Flow, Line, Room
from api.route import Route, Wish
from api.service_class import ServiceClass

INTERACTIVE, JOB, BATCH = ServiceClass


class Traffic:
    """A line whose workers compute one prompt at a time, and who went."""

    def __init__(self, **room: int) -> None:
        # Two prompts of 100 tokens fill the workers.
        self.room = Room(**{"prefill_workers": 1, "step_tokens": 100, "decode_slots": 40} | room)
        self.now = 0.0  # seconds
        self.line = Line(lambda: self.room, "m", lambda: self.now)
        self.gone: list[str] = []
        self.routes: dict[str, Route] = {}

    def enter(
        self,
        *names: str,
        kind: ServiceClass = INTERACTIVE,
        owner: str = "",
        tokens: int = 100,
        wish: Wish = Wish.NONE,
    ) -> None:
        """One prompt, with an answer for each of `names`."""

        def go(route: Route) -> None:
            self.gone.extend(names)
            self.routes.update(dict.fromkeys(names, route))

        self.line.enter(Flow(kind, owner), names, tokens, go, wish)

    def enter_many(self, count: int) -> None:
        for number in range(count):
            self.enter(str(number))

    def end(self, name: str) -> None:
        """It has all its tokens."""
        self.line.has_first_token(name)
        self.line.has_second_token(name)
        self.line.leave(name)

    def serve(self, count: int) -> list[str]:
        """Let the next `count` go, one after the other, and return who it was."""
        begun = len(self.gone)
        ended = 0
        while len(self.gone) < begun + count and ended < len(self.gone):
            self.end(self.gone[ended])
            ended += 1
        return self.gone[begun : begun + count]


def test_while_there_is_room_everybody_goes_at_once() -> None:
    traffic = Traffic()

    for name in ("a", "b"):
        traffic.enter(name)

    assert traffic.gone == ["a", "b"]
    assert len(traffic.line) == 0


def test_as_much_goes_as_keeps_the_prefill_workers_busy() -> None:
    traffic = Traffic()
    for n in range(5):
        traffic.enter(f"r{n}")
    assert traffic.gone == ["r0", "r1"]

    traffic.line.has_first_token("r0")
    assert traffic.gone == ["r0", "r1", "r2"]

    # Another worker has come
    traffic.room = Room(prefill_workers=2, step_tokens=100, decode_slots=40)
    traffic.line.move()
    assert traffic.gone == ["r0", "r1", "r2", "r3", "r4"]


def test_a_prompt_that_is_longer_than_a_step_goes_all_the_same() -> None:
    traffic = Traffic()
    for name in ("a", "b", "c"):
        traffic.enter(name, tokens=5000)

    assert traffic.gone == ["a", "b"]
    traffic.end("a")
    assert traffic.gone == ["a", "b", "c"]


def test_short_prompts_go_in_great_numbers() -> None:
    traffic = Traffic()
    for n in range(50):
        traffic.enter(f"r{n}", tokens=10)

    assert len(traffic.gone) == 20


@pytest.mark.parametrize(
    ("places", "gone"), [(8, 10), (1, 2), (100, 20), (0, 20)], ids=["few", "one", "many", "unknown"]
)
def test_no_more_short_prompts_go_than_prefill_workers_have_places_for(
    places: int, gone: int
) -> None:
    traffic = Traffic(prefill_slots=places)
    for n in range(50):
        traffic.enter(f"r{n}", tokens=10)
    assert len(traffic.gone) == gone

    # Each that is computed lets the next one go
    traffic.line.has_first_token("r0")
    assert len(traffic.gone) == gone + 1


def test_answers_to_one_prompt_have_a_place_each() -> None:
    traffic = Traffic(prefill_slots=8)
    for n in range(20):
        traffic.enter(f"a{n}", f"b{n}", tokens=10)

    assert len(traffic.gone) == 10


def test_answers_to_one_prompt_that_come_together_leave_places_to_others() -> None:
    assert Room(prefill_workers=2, prefill_slots=32).together == 4
    assert Room(prefill_workers=1, prefill_slots=2).together == 1
    # A limit also where there is very much, or nobody has said
    assert Room(prefill_slots=1024).together == Room().together == 64


def test_no_more_go_than_decode_workers_take() -> None:
    # Given decode workers who begin with none
    traffic = Traffic()
    for n in range(30):
        traffic.enter(f"r{n}")
    for n in range(30):
        traffic.line.has_first_token(f"r{n}")

    # Then prefill does not run ahead of them for ever
    assert len(traffic.gone) == 10 + 1
    for name in ("r0", "r1"):
        traffic.line.has_second_token(name)
    assert len(traffic.gone) == 10 + 3


@pytest.mark.parametrize("kind", [INTERACTIVE, JOB])
def test_who_asks_seldom_does_not_wait_for_who_asks_for_very_much(kind: ServiceClass) -> None:
    traffic = Traffic(decode_slots=0)
    for n in range(1000):
        traffic.enter(f"many{n}", kind=kind, owner="greedy")
    traffic.serve(50)

    traffic.enter("one", owner="modest", kind=kind)

    assert "one" in traffic.serve(2)


def test_two_keys_that_ask_for_much_get_the_same() -> None:
    traffic = Traffic()
    for n in range(400):
        traffic.enter(f"long{n}", owner="a", tokens=300)
    for n in range(400):
        traffic.enter(f"short{n}", owner="b", tokens=100)

    served = Counter(name[:4] for name in traffic.serve(300))

    # 400 and 200 are what theirs cost, with a place to decode
    assert served["shor"] / served["long"] == pytest.approx(2, rel=0.05)


def test_who_waits_goes_before_jobs_and_jobs_before_batches_and_nobody_starves() -> None:
    traffic = Traffic(decode_slots=0)
    for n in range(2000):
        for kind in ServiceClass:
            traffic.enter(f"{kind}-{n}", kind=kind)

    served = Counter(name.partition("-")[0] for name in traffic.serve(1110))

    assert served["interactive"] == pytest.approx(1000, abs=15)
    assert served["job"] == pytest.approx(100, abs=10)
    assert served["batch"] == pytest.approx(10, abs=3)


def test_jobs_leave_places_to_who_waits() -> None:
    traffic = Traffic(step_tokens=10_000)
    for n in range(100):
        traffic.enter(f"job{n}", kind=JOB)
    for name in traffic.gone:
        traffic.line.has_first_token(name)
        traffic.line.has_second_token(name)
    assert len(traffic.gone) == 30

    traffic.enter("now")

    assert traffic.gone[-1] == "now"
    traffic.line.leave("job0")
    assert len(traffic.gone) == 32


def test_who_hangs_up_in_line_is_not_let_go() -> None:
    traffic = Traffic()
    for name in ("a", "b", "c", "d"):
        traffic.enter(name)

    traffic.line.leave("c")
    traffic.end("a")

    assert traffic.gone == ["a", "b", "d"]
    for name in ("b", "d"):
        traffic.end(name)
    assert (len(traffic.line), traffic.line._prefilling, traffic.line._flows) == (0, {}, {})


def test_answers_to_one_prompt_go_together() -> None:
    traffic = Traffic()
    traffic.enter("a0", "a1", "a2", tokens=150)
    traffic.enter("b")
    traffic.enter("c")

    assert traffic.gone == ["a0", "a1", "a2", "b"]
    # Their prompt is computed when the first of them has its token
    traffic.line.has_first_token("a0")
    assert traffic.gone[-1] == "c"


# -- which way -------------------------------------------------------------------------------------

SPLIT, SHORT, NO_PREFILL, BUSY, WISHED = Route


def test_a_short_prompt_goes_to_the_worker_that_answers_it() -> None:
    traffic = Traffic(short_tokens=64)

    traffic.enter("at most", tokens=64)
    traffic.enter("more", tokens=65)

    assert traffic.routes == {"at most": SHORT, "more": SPLIT}


def test_nothing_is_short_where_decode_workers_compute_no_prompts() -> None:
    traffic = Traffic(short_tokens=0)

    traffic.enter("a", tokens=1)

    assert traffic.routes == {"a": SPLIT}


def test_decode_workers_compute_few_short_prompts_at_once_and_the_rest_is_prefilled() -> None:
    traffic = Traffic(short_tokens=50, decode_workers=2, step_tokens=1000, decode_active=1)
    for n in range(5):
        traffic.enter(f"r{n}", tokens=50)
    assert list(traffic.routes.values()) == [SHORT] * 4 + [SPLIT]

    # One that has its first token makes room, and one that nobody wants any more
    traffic.line.has_first_token("r0")
    traffic.line.leave("r1")
    for name in ("a", "b", "c"):
        traffic.enter(name, tokens=50)
    assert [traffic.routes[name] for name in ("a", "b", "c")] == [SHORT, SHORT, SPLIT]


def test_short_prompts_that_come_together_fill_a_step_that_keeps_nobody_waiting() -> None:
    traffic = Traffic(short_tokens=50, step_tokens=400, decode_slots=100)
    for n in range(9):
        traffic.enter(f"r{n}", tokens=50)
    assert list(traffic.routes.values()) == [SHORT] * 8 + [SPLIT]

    # Then their answers are written, and steps are kept short
    traffic.line.has_first_token("r0")
    traffic.enter("a", tokens=50)
    assert traffic.routes["a"] == SPLIT


def test_own_answers_that_have_ended_are_not_taken_for_others_work() -> None:
    # Given decode workers that have not said yet that three of this process's requests have ended
    traffic = Traffic(short_tokens=50, step_tokens=400, decode_slots=100)
    for n in range(3):
        traffic.enter(f"before{n}", tokens=50)
        traffic.line.has_first_token(f"before{n}")
    for n in range(3):
        traffic.line.leave(f"before{n}")
    traffic.room = replace(traffic.room, decode_active=3)

    # Then prompts that come together fill a step all the same
    traffic.now += 5
    for n in range(9):
        traffic.enter(f"r{n}", tokens=50)
    assert [traffic.routes[f"r{n}"] for n in range(9)] == [SHORT] * 8 + [SPLIT]

    # But not for ever: who is still there then is somebody else's
    for n in range(9):
        traffic.line.leave(f"r{n}")
    traffic.now += 60
    for n in range(9):
        traffic.enter(f"s{n}", tokens=50)
    assert [traffic.routes[f"s{n}"] for n in range(9)] == [SHORT] * 2 + [SPLIT] * 7


def test_decode_workers_compute_a_part_of_their_places_at_once() -> None:
    traffic = Traffic(short_tokens=50, step_tokens=1000, decode_slots=40)
    for n in range(12):
        traffic.enter(f"r{n}", tokens=1)
    assert list(traffic.routes.values()) == [SHORT] * 10 + [SPLIT] * 2


def test_without_prefill_workers_decode_workers_do_all_of_it_as_far_as_they_have_room() -> None:
    traffic = Traffic(prefill_workers=0, short_tokens=50)
    for n in range(3):
        traffic.enter(f"r{n}", tokens=100)
    assert traffic.routes == {"r0": NO_PREFILL, "r1": NO_PREFILL}

    traffic.line.has_first_token("r0")
    assert traffic.routes["r2"] == NO_PREFILL


def test_without_prefill_workers_and_without_decode_workers_that_do_all_it_goes_to_the_queue() -> (
    None
):
    # Its worker is restarted just now
    traffic = Traffic(prefill_workers=0, short_tokens=0)

    traffic.enter("a")

    assert traffic.routes == {"a": SPLIT}


def test_decode_workers_that_have_nothing_to_do_help_prefill_workers_that_are_busy() -> None:
    traffic = Traffic(short_tokens=50)
    for name in ("a", "b", "c", "d"):
        traffic.enter(name)

    # One: then they have something to do
    assert traffic.routes == {"a": SPLIT, "b": SPLIT, "c": BUSY}
    traffic.line.has_first_token("c")
    assert "d" not in traffic.routes
    traffic.line.leave("c")
    assert traffic.routes["d"] == BUSY


@pytest.mark.parametrize(
    ("tokens", "active"), [(401, 0), (100, 1)], ids=["the prompt is long", "they work for others"]
)
def test_they_do_not_help_where_answers_would_have_to_wait(tokens: int, active: int) -> None:
    traffic = Traffic(short_tokens=50, decode_active=active)
    traffic.enter("a")
    traffic.enter("b")

    traffic.enter("c", tokens=tokens)

    assert "c" not in traffic.routes
    traffic.end("a")
    assert traffic.routes["c"] == SPLIT


def test_a_caller_may_decide_to_compare_the_two() -> None:
    traffic = Traffic(short_tokens=50)

    traffic.enter("long", tokens=400, wish=Wish.WHOLE)
    traffic.enter("short", tokens=10, wish=Wish.SPLIT)

    assert traffic.routes == {"long": WISHED, "short": SPLIT}


def test_who_wants_both_stages_waits_for_them() -> None:
    traffic = Traffic(short_tokens=50)
    for name in ("a", "b", "c"):
        traffic.enter(name, wish=Wish.SPLIT)

    assert traffic.routes == {"a": SPLIT, "b": SPLIT}


def test_nobody_gets_a_whole_answer_of_a_decode_worker_that_computes_no_prompts() -> None:
    traffic = Traffic(short_tokens=0)

    traffic.enter("a", wish=Wish.WHOLE)

    assert traffic.routes == {"a": SPLIT}


def test_as_much_goes_as_is_this_processs_part_of_the_workers() -> None:
    traffic = Traffic(prefill_slots=8, step_tokens=1000, prefill_workers=2)

    traffic.room = replace(traffic.room, part=0.5)
    traffic.enter_many(10)
    assert len(traffic.gone) == 5  # of eight places, and a quarter beyond, half

    traffic.room = replace(traffic.room, part=0.25)
    traffic.end("0")
    traffic.end("1")
    assert len(traffic.gone) == 5
    traffic.end("2")
    assert len(traffic.gone) == 6

    traffic.room = replace(traffic.room, part=1.0)
    traffic.line.move()
    assert len(traffic.gone) == 10


def test_each_process_has_a_place_however_many_there_are() -> None:
    traffic = Traffic(prefill_slots=4)
    traffic.room = replace(traffic.room, part=0.001)

    for name in ("a", "b"):
        traffic.enter(name)

    assert traffic.gone == ["a"]
    traffic.end("a")
    assert traffic.gone == ["a", "b"]


def test_it_needs_the_places_that_it_has_and_all_while_somebody_waits() -> None:
    traffic = Traffic(prefill_slots=8, step_tokens=1000, decode_slots=400)
    assert traffic.line.need() == 0

    traffic.enter("a")
    assert traffic.line.need() == pytest.approx(0.1)  # of ten
    traffic.line.has_first_token("a")
    assert traffic.line.need() == pytest.approx(0.01)  # of a hundred on their way
    traffic.line.has_second_token("a")
    assert traffic.line.need() == 0, "what decode workers write takes no place"
    traffic.line.leave("a")

    traffic.enter_many(10)
    assert traffic.line.need() == pytest.approx(1.0)
    traffic.room = replace(traffic.room, part=0.1)
    traffic.enter("b")
    traffic.end("0")
    assert traffic.line.need() == 1.0
