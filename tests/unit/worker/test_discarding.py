"""Are blocks of finished requests deleted without anybody waiting? With a double of the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import valkey
from prometheus_client import REGISTRY

from pdtasks import background
from pdtasks.background import Background
from pdtasks.worker import discarding
from pdtasks.worker.discarding import Discarder
from tests.waiting import wait_until


class StubStore:
    """Remembers what is deleted; may hang or fail."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.errors: list[Exception] = []
        self.answers = threading.Event()
        self.answers.set()
        self.on_their_way: set[str] = set()

    def delete(self, names: list[str]) -> list[str]:
        self.calls.append(names)
        assert self.answers.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        return [name for name in names if name in self.on_their_way]

    def close(self) -> None:
        """Nothing to close."""

    @property
    def deleted(self) -> list[str]:
        return [name for names in self.calls for name in names]


def num_left() -> float:
    return REGISTRY.get_sample_value("pdtasks_kv_left_to_ttl_total") or 0.0


@pytest.fixture
def store() -> Iterator[StubStore]:
    made = StubStore()
    yield made
    made.answers.set()


@pytest.fixture
def beside() -> Background:
    return Background()


@pytest.fixture
def ten_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discarding, "MOST_WAITING", 10)


@pytest.fixture
def discarder(store: StubStore, beside: Background, monkeypatch: pytest.MonkeyPatch) -> Discarder:
    monkeypatch.setattr(background, "_PAUSE_S", 0.05)
    double: Any = store
    return Discarder(double, beside)


def test_names_that_gather_are_deleted_in_one_call(discarder: Discarder, store: StubStore) -> None:
    store.answers.clear()
    discarder.discard(["first"])
    wait_until(lambda: store.calls)

    for n in range(20):
        discarder.discard([f"r{n}"])
    store.answers.set()

    wait_until(lambda: len(store.deleted) == 21)
    assert store.calls == [["first"], [f"r{n}" for n in range(20)]]


def test_a_store_that_hangs_does_not_hold_up_a_close(
    discarder: Discarder, store: StubStore
) -> None:
    store.answers.clear()
    for n in range(20):
        discarder.discard([f"r{n}"])

    began = time.monotonic()
    discarder.close()

    assert time.monotonic() - began < 2
    # and what comes later is no error
    discarder.discard(["late"])


def test_a_close_deletes_what_is_left(discarder: Discarder, store: StubStore) -> None:
    discarder.discard(["a", "b"])

    discarder.close()

    assert sorted(store.deleted) == ["a", "b"]


def test_a_store_that_is_away_costs_its_names_alone(
    discarder: Discarder, store: StubStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.errors = [valkey.ConnectionError("refused")]
    discarder.discard(["a"])
    wait_until(lambda: not store.errors)

    discarder.discard(["b"])

    wait_until(lambda: store.deleted[-1] == "b")


def test_a_surprise_does_not_end_it(
    discarder: Discarder, store: StubStore, beside: Background
) -> None:
    store.errors = [KeyError("surprise")]
    discarder.discard(["a"])
    wait_until(lambda: beside.failures()["discard"] == 1)

    discarder.discard(["b"])

    wait_until(lambda: store.deleted[-1] == "b")


@pytest.mark.parametrize("error", [valkey.ConnectionError("refused"), KeyError("surprise")])
def test_whatever_was_not_deleted_is_counted(
    discarder: Discarder, store: StubStore, error: Exception
) -> None:
    # Given names of a call that fails, and others that come meanwhile
    before = num_left()
    store.errors = [error]
    store.answers.clear()
    discarder.discard(["a", "b"])
    wait_until(lambda: store.calls)
    discarder.discard(["c", "d", "e"])

    # When the worker stops before they have had their turn
    discarder.close()
    assert num_left() - before == 3

    # Then those of the call are counted when it ends
    store.answers.set()
    wait_until(lambda: num_left() - before == 5)


def test_what_cannot_be_deleted_does_not_pile_up(
    ten_at_most: None, discarder: Discarder, store: StubStore
) -> None:
    store.answers.clear()
    discarder.discard(["first"])
    wait_until(lambda: store.calls)

    for n in range(100):
        discarder.discard([f"r{n}"])
    store.answers.set()

    wait_until(lambda: len(store.deleted) == 11)
    assert store.deleted == ["first", *(f"r{n}" for n in range(90, 100))]


def test_a_block_that_comes_after_its_answer_is_deleted_too(
    discarder: Discarder, store: StubStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discarding, "AGAIN_S", (0.1, 0.2))
    store.on_their_way = {"late", "never"}
    discarder.discard(["there", "late", "never"])
    wait_until(lambda: store.calls)
    store.on_their_way = {"never", "other"}

    wait_until(lambda: len(store.calls) == 3)
    assert store.calls[1:] == [["late", "never"], ["never"]]
    # That was the last look: there is none while another one has all of its own
    discarder.discard(["other"])
    wait_until(lambda: len(store.calls) >= 6)
    assert store.calls[3:] == [["other"]] * 3
