"""Does Python look for garbage rarely while a process starts, and as ever after that?"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue

import pytest

from pdtasks import collecting


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Whatever a test does, the process goes on as it was."""
    threshold, callbacks = gc.get_threshold(), list(gc.callbacks)
    config = dict(vars(multiprocessing.current_process())["_config"])
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)
    gc.callbacks[:] = callbacks
    vars(multiprocessing.current_process())["_config"] = config


def test_what_is_there_at_the_end_is_never_looked_through_again() -> None:
    before = gc.get_threshold()
    kept: list[object] = []

    with collecting.rarely():
        during = gc.get_threshold()
        kept.append([])

    assert during > before
    assert gc.get_threshold() == before
    assert not any(found is kept for found in gc.get_objects())


def test_an_import_that_fails_leaves_nothing_changed() -> None:
    before = gc.get_threshold()

    with pytest.raises(ImportError), collecting.rarely():
        raise ImportError

    assert gc.get_threshold() == before


class _Told:
    """Tells, where it is unpickled, how garbage is looked for there."""

    def __reduce__(self) -> tuple[object, ...]:
        return gc.get_threshold, ()


def _tell(unpickled_last: object, answers: SimpleQueue[object]) -> None:
    while_it_started = unpickled_last
    gc.collect()
    answers.put((while_it_started, gc.get_threshold()))


def test_a_process_that_is_started_begins_so_until_its_first_full_collection() -> None:
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.SimpleQueue()
    collecting.rarely_in_children()

    child = spawn.Process(target=_tell, args=(_Told(), answers))
    child.start()
    while_it_started, afterwards = answers.get()
    child.join(60)

    assert while_it_started > gc.get_threshold()
    assert afterwards == gc.get_threshold()


def test_its_own_children_begin_so_too() -> None:
    collecting.rarely_in_children()
    config = vars(multiprocessing.current_process())["_config"]

    inherited = pickle.loads(pickle.dumps(config["pdtasks_collecting"]))

    before_the_first_full_collection = gc.get_threshold()
    gc.collect()
    assert before_the_first_full_collection > gc.get_threshold()
    assert pickle.loads(pickle.dumps(inherited)) is not None
