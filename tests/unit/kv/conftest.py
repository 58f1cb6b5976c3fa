"""What tests of the transfer and of the lookup start from.

vLLM and torch are imported by the fixtures that need them: most files here do without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.kv.doubles import MemoryStore

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pdtasks.kv.lookup import BlockLookup
    from tests.unit.kv.vllm_scheduler import FakeProbe, FakeScheduler
    from tests.unit.kv.vllm_worker import Side

# -- transfer ----------------------------------------------------------------------------------


@pytest.fixture
def store() -> MemoryStore:
    """The store of all sides of a test."""
    return MemoryStore()


@pytest.fixture
def make_side(store: MemoryStore) -> Iterator[Callable[..., Side]]:
    """Makes sides, and sees to it that they keep nothing and close the store."""
    from tests.unit.kv.vllm_worker import Side

    sides: list[Side] = []

    def make(**options: Any) -> Side:
        sides.append(Side(store, **options))
        return sides[-1]

    yield make
    store.let_go()
    for side in sides:
        side.end()
        side.transfer.close()
    assert store.closed


@pytest.fixture
def prefill(make_side: Callable[..., Side]) -> Side:
    """A side that has computed something."""
    from tests.unit.kv.vllm_worker import fill

    side = make_side()
    fill(side)
    return side


@pytest.fixture
def decode(make_side: Callable[..., Side]) -> Side:
    """A side that has computed nothing."""
    return make_side()


# -- lookup ------------------------------------------------------------------------------------


@pytest.fixture
def probe() -> FakeProbe:
    """What the lookups of a test ask."""
    from tests.unit.kv.vllm_scheduler import FakeProbe

    return FakeProbe()


@pytest.fixture
def make_lookup(
    probe: FakeProbe, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., BlockLookup]]:
    """Makes lookups, and sees to it that they keep nothing of requests that have ended."""
    from vllm.v1.request import RequestStatus

    from pdtasks.kv.lookup import BlockLookup
    from tests.unit.kv.vllm_scheduler import FakeScheduler, a_lookup

    made: list[BlockLookup] = []
    running: dict[tuple[BlockLookup, str], Request] = {}
    begin, end = BlockLookup.on_new_request, BlockLookup.finish

    def on_new_request(lookup: BlockLookup, request: Request) -> None:
        running[lookup, request.request_id] = request
        begin(lookup, request)

    def finish(lookup: BlockLookup, request: Request) -> tuple[bool, dict[str, Any] | None]:
        running.pop((lookup, request.request_id), None)
        return end(lookup, request)

    monkeypatch.setattr(BlockLookup, "on_new_request", on_new_request)
    monkeypatch.setattr(BlockLookup, "finish", finish)

    def make(**options: Any) -> BlockLookup:
        made.append(a_lookup(probe, **options))
        return made[-1]

    yield make
    for (lookup, _), request in list(running.items()):
        request.status = RequestStatus.FINISHED_ABORTED
        lookup.finish(request)
    for lookup in made:
        FakeScheduler(lookup).step()
        assert lookup.leftovers() == {}


@pytest.fixture
def lookup(make_lookup: Callable[..., BlockLookup]) -> BlockLookup:
    """The one that most tests need."""
    return make_lookup()


@pytest.fixture
def scheduler(lookup: BlockLookup) -> FakeScheduler:
    """Steps of `lookup`."""
    from tests.unit.kv.vllm_scheduler import FakeScheduler

    return FakeScheduler(lookup)
