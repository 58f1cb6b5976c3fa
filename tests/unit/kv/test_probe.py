"""How much of a prompt does the store have already?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtasks.kv import probe as probe_module
from pdtasks.kv.probe import PrefixProbe
from tests.unit.kv.doubles import MemoryStore
from tests.waiting import wait_until

MakeProbe = Callable[[], PrefixProbe]


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(probe_module, "time", clock)
    return clock


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def probe(store: MemoryStore, clock: Clock) -> Iterator[PrefixProbe]:
    probe = made(store)
    yield probe
    store.let_go()
    probe.close()


def made(store: Any) -> PrefixProbe:
    return PrefixProbe(store)


def names(num_blocks: int, num_ranks: int = 1, prompt: str = "p") -> list[list[str]]:
    """The names of a prompt's blocks."""
    return [[f"{prompt}{block}:{rank}" for rank in range(num_ranks)] for block in range(num_blocks)]


def answer(probe: PrefixProbe, request_id: str = "r") -> int:
    """What the probe finds, when it has found it."""
    found: list[int] = []

    def known() -> bool:
        count = probe.take(request_id)
        if count is not None:
            found.append(count)
        return count is not None

    wait_until(known)
    return found[0]


def fill(store: MemoryStore, blocks: list[list[str]]) -> None:
    store.values |= {name: b"x" for ranks in blocks for name in ranks}


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("num_there", [0, 1, 2, 5])
def test_leading_blocks_that_are_there_are_counted(
    probe: PrefixProbe, store: MemoryStore, num_there: int, num_ranks: int
) -> None:
    blocks = names(5, num_ranks)
    fill(store, blocks[:num_there])

    probe.start("r", blocks)

    assert answer(probe) == num_there


def test_a_block_behind_a_gap_does_not_count(probe: PrefixProbe, store: MemoryStore) -> None:
    blocks = names(5)
    fill(store, [*blocks[:2], *blocks[3:]])

    probe.start("r", blocks)

    assert answer(probe) == 2


def test_a_block_of_which_one_rank_lacks_its_part_does_not_count(
    probe: PrefixProbe, store: MemoryStore
) -> None:
    blocks = names(4, num_ranks=2)
    fill(store, blocks)
    del store.values["p2:1"]

    probe.start("r", blocks)

    assert answer(probe) == 2


@given(
    there=st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=8),
)
def test_whatever_is_there_the_count_is_of_leading_whole_blocks(there: list[list[bool]]) -> None:
    store, blocks = MemoryStore(), names(len(there), num_ranks=2)
    for ranks, found in zip(blocks, there, strict=True):
        store.values |= {n: b"x" for n, is_there in zip(ranks, found, strict=True) if is_there}

    counted = made(store)._count(blocks)

    whole = [all(found) for found in there]
    assert counted == (whole.index(False) if False in whole else len(whole))


def test_a_prompt_that_shares_nothing_costs_one_name_for_each_rank(
    probe: PrefixProbe, store: MemoryStore
) -> None:
    probe.start("r", names(100, num_ranks=2))

    assert answer(probe) == 0
    assert store.touched == [["p0:0", "p0:1"]]


def test_a_prompt_that_shares_something_costs_two_questions(
    probe: PrefixProbe, store: MemoryStore
) -> None:
    blocks = names(100)
    fill(store, blocks[:30])

    probe.start("r", blocks)

    assert answer(probe) == 30
    assert [len(keys) for keys in store.touched] == [1, 99]


def test_the_answer_is_unknown_while_the_store_is_silent_and_given_once(
    probe: PrefixProbe, store: MemoryStore
) -> None:
    fill(store, names(3))
    store.hold("touch")
    probe.start("r", names(3))

    assert [probe.take("r") for _ in range(3)] == [None, None, None]

    store.let_go()
    assert answer(probe) == 3
    assert probe.take("r") == 0


def test_what_nobody_asked_for_is_zero(probe: PrefixProbe, store: MemoryStore) -> None:
    probe.start("nothing to look for", [])

    assert probe.take("nothing to look for") == 0
    assert probe.take("never heard of") == 0
    assert store.touched == []


def test_answers_of_several_requests_are_kept_apart(probe: PrefixProbe, store: MemoryStore) -> None:
    for count in range(4):
        fill(store, names(count, prompt=f"p{count}"))
        probe.start(f"r{count}", names(9, prompt=f"p{count}"))

    assert [answer(probe, f"r{count}") for count in range(4)] == [0, 1, 2, 3]


def test_a_late_answer_is_zero_and_probes_rest_for_a_while(
    probe: PrefixProbe, store: MemoryStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a store that does not answer
    fill(store, names(3))
    store.hold("touch")
    probe.start("r", names(3))
    assert probe.take("r") is None

    # When the time is over
    clock.now += probe_module.PROBE_TIMEOUT_S
    assert probe.take("r") == 0
    assert probe.take("r") == 0
    assert "no answer in time" in caplog.text
    store.let_go()
    wait_until(lambda: not store.under_way["touch"])

    # Then further requests do not wait for it
    asked = len(store.touched)
    probe.start("s", names(3))
    assert probe.take("s") == 0
    assert len(store.touched) == asked

    # until it has had its rest
    clock.now += 5.0
    probe.start("t", names(3))
    assert answer(probe, "t") == 3


def test_an_error_of_the_store_is_zero_and_probes_rest_for_a_while(
    probe: PrefixProbe, store: MemoryStore, clock: Clock
) -> None:
    fill(store, names(3))
    store.away = True
    probe.start("r", names(3))
    assert answer(probe) == 0

    store.away = False
    probe.start("s", names(3))
    assert probe.take("s") == 0, "the store is left alone"

    clock.now += 5.0
    probe.start("t", names(3))
    assert answer(probe, "t") == 3


def test_an_error_halfway_leaves_what_was_found_before(
    probe: PrefixProbe, store: MemoryStore
) -> None:
    fill(store, names(3))
    store.broken.add("p2:0")

    probe.start("r", names(3))

    assert answer(probe) == 1


def test_an_error_that_nobody_expects_does_not_reach_the_scheduler(clock: Clock) -> None:
    class Surprising(MemoryStore):
        def touch(self, keys: object) -> list[bool]:
            raise RuntimeError("no store error")

    probe = made(Surprising())
    probe.start("r", names(3))

    assert answer(probe) == 0
    probe.close()


def test_a_forgotten_request_leaves_nothing(probe: PrefixProbe, store: MemoryStore) -> None:
    store.hold("touch")
    for name in ("under way", "waiting"):
        probe.start(name, names(3, prompt=name))
    wait_until(lambda: store.under_way["touch"])

    for name in ("under way", "waiting", "unknown"):
        probe.forget(name)
    store.let_go()
    probe.start("r", names(3))

    assert answer(probe) == 0
    assert [keys[0] for keys in store.touched] == ["under way0:0", "p0:0"]
    assert probe.take("under way") == probe.take("waiting") == 0
    assert not probe._asked


def test_closing_ends_the_thread_and_the_store(store: MemoryStore) -> None:
    probe = made(store)
    probe.start("r", names(3))
    assert answer(probe) == 0

    probe.close()

    assert store.closed
    assert not [t for t in threading.enumerate() if t.name.startswith("kv-probe")]


def test_a_close_waits_for_one_round_trip_and_not_for_a_long_prompt(store: MemoryStore) -> None:
    # Given a probe in the middle of a prompt that takes many questions, and a slow store
    blocks = names(100)
    fill(store, blocks)
    probe = made(store)
    store.hold("touch")
    probe.start("r", blocks)
    wait_until(lambda: store.under_way["touch"])

    # When it is closed meanwhile
    with ThreadPoolExecutor(1) as thread:
        closing = thread.submit(probe.close)
        wait_until(lambda: probe._thread._shutdown)
        store.let_go()
        closing.result(10)

    # Then no further question was asked
    assert [len(keys) for keys in store.touched] == [1]
    assert store.closed
