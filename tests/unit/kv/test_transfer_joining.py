"""Loads that are told before they are there: the step that needs them waits for the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pdtasks.kv.pages import Blocks, Copier
from pdtasks.kv.plan import Join, TransferPlan
from tests.unit.kv.vllm_worker import BLOCK_BYTES, Side, a_handle, a_load, a_save, fill
from tests.waiting import wait_until


class HeldCopier(Copier):
    """Copies into the cache when it may."""

    may_copy = threading.Event()
    num_begun = 0
    error: Exception | None = None

    def scatter(self, blocks: Blocks, *, pinned: bool) -> None:
        type(self).num_begun += 1
        assert self.may_copy.wait(20)
        if self.error is not None:
            raise self.error
        super().scatter(blocks, pinned=pinned)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HeldCopier]]:
    HeldCopier.may_copy, HeldCopier.num_begun, HeldCopier.error = threading.Event(), 0, None
    monkeypatch.setattr("pdtasks.kv.movers.Copier", HeldCopier)
    monkeypatch.setattr("pdtasks.kv.loading._BATCH_BYTES", BLOCK_BYTES)  # one block at a time
    yield HeldCopier
    HeldCopier.may_copy.set()


@pytest.fixture
def prefill(make_side: Callable[..., Side]) -> Side:
    side = make_side(ring_slots=8)
    fill(side)
    side.step(a_save(a_handle(), [5, 0, 3]))
    side.step_until(lambda: side.records)
    return side


def a_load_soon(prefill: Side) -> TransferPlan:
    return a_load(prefill.handed_over(a_handle()), [1, 2, 4], join=Join.SOON)


@contextmanager
def a_step_that_waits(side: Side, plan: TransferPlan) -> Iterator[None]:
    """Ends the step when the body has ended, not before."""
    step = threading.Thread(target=side.step, args=(plan,))
    step.start()
    step.join(0.2)
    assert step.is_alive(), "it does not wait"
    yield
    step.join(20)
    assert not step.is_alive()


def test_a_load_is_told_at_once_and_the_step_with_its_request_waits(
    prefill: Side, held: type[HeldCopier], make_side: Callable[..., Side]
) -> None:
    decode = make_side()
    decode.step(a_load_soon(prefill))
    assert decode.received == {"d": 1}
    decode.step()  # others go on
    assert not decode.cache.any()

    with a_step_that_waits(decode, TransferPlan(joined={"d"})):
        held.may_copy.set()

    assert decode.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    decode.steps()
    assert decode.received == {"d": 1}
    (record,) = decode.records
    assert (record["op"], record["blocks"], record["missing"]) == ("load", 3, 0)


def test_a_step_does_not_wait_for_what_is_there(
    prefill: Side, make_side: Callable[..., Side]
) -> None:
    decode = make_side()
    decode.step(a_load_soon(prefill))
    decode.step_until(lambda: decode.records)
    decode.step(TransferPlan(joined={"d"}))
    assert decode.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()


def test_a_long_load_is_told_when_little_of_it_is_left(
    prefill: Side, held: type[HeldCopier], make_side: Callable[..., Side]
) -> None:
    decode = make_side(soon_blocks=1)
    decode.step(a_load_soon(prefill))
    decode.steps()
    assert not decode.received
    held.may_copy.set()
    decode.step_until(lambda: decode.received)
    decode.step(TransferPlan(joined={"d"}))
    assert decode.received == {"d": 1}
    assert not decode.failed


@pytest.mark.parametrize("soon_blocks", [8, 0])
def test_nothing_is_copied_any_more_once_its_request_has_ended(
    prefill: Side, held: type[HeldCopier], make_side: Callable[..., Side], soon_blocks: int
) -> None:
    decode = make_side(soon_blocks=soon_blocks, num_threads=2)
    decode.step(a_load_soon(prefill))
    wait_until(lambda: held.num_begun == 2)

    # The step may give the blocks to another request: it waits for those that are being copied.
    with a_step_that_waits(decode, TransferPlan(left={"d"})):
        held.may_copy.set()

    decode.step_until(lambda: not decode.transfer.leftovers())
    assert held.num_begun == 2
    assert decode.received == {"d": 1}, "vLLM frees the blocks by that"


def test_an_engine_ends_when_what_it_was_told_of_is_lost(
    prefill: Side, held: type[HeldCopier], make_side: Callable[..., Side]
) -> None:
    decode = make_side()
    held.error = RuntimeError("the GPU has fallen off the bus")
    decode.step(a_load_soon(prefill))
    held.may_copy.set()
    decode.step_until(lambda: decode.records)

    with pytest.raises(RuntimeError, match="was lost while its step waited"):
        decode.step(TransferPlan(joined={"d"}))


def test_what_is_lost_before_it_was_told_is_recomputed(
    prefill: Side, held: type[HeldCopier], make_side: Callable[..., Side]
) -> None:
    decode = make_side(soon_blocks=0)
    held.error = RuntimeError("the GPU has fallen off the bus")
    decode.step(a_load_soon(prefill))
    held.may_copy.set()
    decode.step_until(lambda: decode.failed)

    decode.step(TransferPlan(joined={"d"}))
    assert (decode.received, decode.failed) == ({"d": 1}, {"d": 1})
