"""When does a request wait for blocks in a ring, and when does a step wait for them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from vllm.v1.request import RequestStatus

from pdtasks.kv import lookup as lookup_module
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.lookup import BlockLookup
from pdtasks.kv.params import ours
from pdtasks.kv.plan import Join
from pdtasks.kv.ring import Presence
from tests.unit.kv.vllm_scheduler import BLOCK, FakeScheduler, a_request, blocks_of


class FakeRings:
    """Rings that have what a test says of them."""

    def __init__(self) -> None:
        self.says = Presence.HERE
        self.asked: list[tuple[KVHandle, int]] = []
        self.keeps = True
        self.cached = False

    def are_cached(self, handle: KVHandle, first: int) -> bool:
        return self.cached

    def keep(self, handle: KVHandle, first: int, seconds: float) -> bool:
        return self.keeps

    def presence(self, handle: KVHandle, first: int) -> Presence:
        self.asked.append((handle, first))
        return self.says


@pytest.fixture(autouse=True)
def _rings_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_module, "is_there", lambda name: "missing" not in name)


@pytest.fixture
def rings() -> FakeRings:
    return FakeRings()


@pytest.fixture
def lookup(make_lookup: Callable[..., BlockLookup], rings: FakeRings) -> BlockLookup:
    return make_lookup(
        ring="engine-a", rings=rings, block_bytes=100, short_bytes=300, sync_bytes=300
    )


def a_handed_over_prompt(
    make_lookup: Callable[..., BlockLookup], num_tokens: int = 40, **changes: Any
) -> dict[str, Any]:
    """The handle of a prompt that another engine has computed, as it travels."""
    prefill = make_lookup(ring="engine-b", rings=FakeRings())
    request = a_request(num_tokens, "p", save="t")
    scheduler = FakeScheduler(prefill)
    scheduler.add(request, [1, 2, 3, 4, 5, 6])
    scheduler.step({request: num_tokens})
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, wire = prefill.finish(request)
    handle = KVHandle.from_wire(ours(wire)["handle"])
    return msgspec.structs.replace(handle, **changes).to_wire()


def a_resumed_request(handle: dict[str, Any], num_tokens: int = 40, name: str = "r") -> Any:
    return a_request(num_tokens, name, load=handle, resume=[7])


def test_a_handle_names_the_ring_and_the_blocks_numbers_there(
    make_lookup: Callable[..., BlockLookup],
) -> None:
    lookup = make_lookup(ring="engine-a")
    scheduler = FakeScheduler(lookup)
    first, other = a_request(40, "a", save="t"), a_request(20, "b", save="u")
    scheduler.add(first, [1, 2, 3])
    scheduler.add(other, [4, 5])

    # In two chunks, between which another prompt comes
    (save,) = scheduler.step({first: 16}).saves
    assert [save.number(0)] == [0]
    (save,) = scheduler.step({other: 20}).saves
    assert [save.number(0), save.number(1)] == [1, 2]
    (save,) = scheduler.step({first: 24}).saves
    assert [save.number(1), save.number(2)] == [3, 4]

    first.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, wire = lookup.finish(first)
    handle = KVHandle.from_wire(ours(wire)["handle"])
    assert handle.ring == "engine-a"
    assert [handle.number(i) for i in range(4)] == [0, 3, 4, None]


def test_a_preempted_prompt_has_the_numbers_of_its_second_save(
    make_lookup: Callable[..., BlockLookup],
) -> None:
    lookup = make_lookup(ring="engine-a")
    scheduler = FakeScheduler(lookup)
    request = a_request(40, "a", save="t")
    scheduler.add(request, [1, 2, 3])
    scheduler.step({request: 16})
    scheduler.step(preempted=scheduler.preempt(request, [4, 5, 6]))
    scheduler.step({request: 40})

    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, wire = lookup.finish(request)
    assert KVHandle.from_wire(ours(wire)["handle"]).numbers == ((1, 3),)


@pytest.mark.parametrize("ring", [None, "missing"])
def test_an_engine_without_a_ring_names_none(
    make_lookup: Callable[..., BlockLookup], ring: str | None
) -> None:
    # (missing: there was no room for it)
    scheduler = FakeScheduler(lookup := make_lookup(ring=ring))
    request = a_request(40, "a", save="t")
    scheduler.add(request, [1, 2, 3])
    scheduler.step({request: 40})

    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, wire = lookup.finish(request)
    handle = KVHandle.from_wire(ours(wire)["handle"])
    assert (handle.ring, handle.numbers) == (None, ())


def test_what_is_in_a_ring_is_loaded_by_the_step_that_runs_the_request(
    lookup: BlockLookup, make_lookup: Callable[..., BlockLookup], rings: FakeRings
) -> None:
    request = a_resumed_request(a_handed_over_prompt(make_lookup))
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, BLOCK) == 24
    assert not lookup.loads_beside(request)
    assert rings.asked[-1][1] == 1, "the first block is here already"
    lookup.plan_load(request, blocks_of([7, 8, 9, 10], num_cached=3), 24)

    plan = FakeScheduler(lookup).step()
    (load,) = plan.loads
    assert (load.first, load.block_ids, load.join) == (1, [8, 9], Join.NOW)
    assert plan.written == [8, 9]


def test_what_will_be_in_a_ring_is_waited_for_but_not_for_ever(
    lookup: BlockLookup,
    make_lookup: Callable[..., BlockLookup],
    rings: FakeRings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = a_resumed_request(a_handed_over_prompt(make_lookup))
    lookup.on_new_request(request)
    rings.says = Presence.NOT_YET

    assert lookup.num_loadable_tokens(request, 0) is None
    monkeypatch.setattr(lookup_module, "_RING_WAIT_S", 0.0)
    lookup._waits_until.clear()

    assert lookup.num_loadable_tokens(request, 0) == 40
    assert lookup.loads_beside(request)


@pytest.mark.parametrize("why", ["gone", "no ring", "too much", "nothing to compute", "used again"])
def test_all_else_is_loaded_beside_the_steps(
    lookup: BlockLookup, make_lookup: Callable[..., BlockLookup], rings: FakeRings, why: str
) -> None:
    num_tokens = 60 if why == "too much" else 40
    changes = {"ring": None, "numbers": ()} if why == "no ring" else {}
    handle = a_handed_over_prompt(make_lookup, num_tokens, **changes)
    request = a_resumed_request(handle, num_tokens)
    if why == "nothing to compute":
        request = a_request(num_tokens, load=handle, resume=[])
    lookup.on_new_request(request)
    if why == "gone":
        rings.says = Presence.GONE
    rings.keeps = why != "used again"

    assert lookup.num_loadable_tokens(request, 0) == num_tokens
    assert lookup.loads_beside(request)
    lookup.plan_load(request, blocks_of([1, 2, 3, 4]), num_tokens)
    (load,) = FakeScheduler(lookup).step().loads
    is_certain = why in ("too much", "nothing to compute")
    assert load.join is (Join.SOON if is_certain else Join.THERE)


def test_others_are_not_kept_waiting_for_a_long_load(
    make_lookup: Callable[..., BlockLookup], rings: FakeRings
) -> None:
    lookup = make_lookup(
        ring="engine-a", rings=rings, block_bytes=100, short_bytes=200, sync_bytes=300
    )
    handle = a_handed_over_prompt(make_lookup)
    beside = []
    # The last one has its first block here already
    for name, num_computed in (("alone", 0), ("long", 0), ("short", BLOCK)):
        request = a_resumed_request(handle, name=name)
        lookup.on_new_request(request)
        lookup.num_loadable_tokens(request, num_computed)
        beside.append(lookup.loads_beside(request))
    assert beside == [False, True, False]


def test_a_load_from_gpu_to_gpu_is_short(
    make_lookup: Callable[..., BlockLookup], rings: FakeRings
) -> None:
    lookup = make_lookup(
        ring="engine-a", rings=rings, block_bytes=100, short_bytes=200, sync_bytes=300
    )
    handle = a_handed_over_prompt(make_lookup)
    rings.cached = True
    beside = []
    for name in ("alone", "long"):
        request = a_resumed_request(handle, name=name)
        lookup.on_new_request(request)
        lookup.num_loadable_tokens(request, 0)
        beside.append(lookup.loads_beside(request))
    assert beside == [False, False]


def test_the_first_step_that_may_read_a_load_is_told(
    lookup: BlockLookup, make_lookup: Callable[..., BlockLookup]
) -> None:
    request = a_long_load(lookup, make_lookup)
    scheduler = FakeScheduler(lookup)

    assert [load.request_id for load in scheduler.step().loads] == ["r"]
    assert scheduler.step().joined == set()
    request.status = RequestStatus.WAITING  # vLLM has been told that it is done
    assert scheduler.step().joined == {"r"}
    assert scheduler.step().joined == set()
    lookup.finish(request)
    assert scheduler.step().left == set(), "it was in a step: nothing is copied any more"
    assert lookup.leftovers() == {}


def test_the_next_step_is_told_of_a_load_whose_request_has_ended(
    lookup: BlockLookup, make_lookup: Callable[..., BlockLookup]
) -> None:
    request = a_long_load(lookup, make_lookup)
    scheduler = FakeScheduler(lookup)
    scheduler.step()

    request.status = RequestStatus.FINISHED_ABORTED
    lookup.finish(request)

    plan = scheduler.step()
    assert (plan.left, plan.joined) == ({"r"}, set())
    assert scheduler.step().left == set()
    assert lookup.leftovers() == {}


def a_long_load(lookup: BlockLookup, make_lookup: Callable[..., BlockLookup]) -> Any:
    """A request for which vLLM has allocated blocks, and which waits for them."""
    request = a_resumed_request(a_handed_over_prompt(make_lookup, 60), 60)
    lookup.on_new_request(request)
    num_tokens = lookup.num_loadable_tokens(request, 0)
    assert num_tokens == 60
    assert lookup.loads_beside(request)
    lookup.plan_load(request, blocks_of([1, 2, 3, 4]), num_tokens)
    request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    return request


def test_a_step_waits_for_no_more_than_its_share(
    lookup: BlockLookup, make_lookup: Callable[..., BlockLookup]
) -> None:
    handle = a_handed_over_prompt(make_lookup)
    beside = []
    for name in ("a", "b"):
        request = a_resumed_request(handle, name=name)
        lookup.on_new_request(request)
        num_tokens = lookup.num_loadable_tokens(request, 0)
        beside.append(lookup.loads_beside(request))
        lookup.plan_load(request, blocks_of([1, 2, 3]), num_tokens or 0)

    assert beside == [False, True]
    joins = [load.join for load in FakeScheduler(lookup).step().loads]
    assert joins == [Join.NOW, Join.SOON]


@pytest.mark.parametrize(
    "odd",
    [
        {"ring": "../x"},
        {"numbers": ((-5, 3),)},
        {"numbers": ((2**63, 3),)},
        {"numbers": ((0, 0), (0, 3))},
        {"numbers": ((0, 2),)},
        {"numbers": ()},
    ],
)
def test_what_a_client_has_made_up_of_a_ring_is_no_danger(
    make_lookup: Callable[..., BlockLookup], odd: dict[str, Any]
) -> None:
    from pdtasks.kv.rings import Rings

    lookup = make_lookup(ring="engine-a", rings=Rings(payloads=False), sync_bytes=1 << 30)
    request = a_resumed_request(a_handed_over_prompt(make_lookup, **odd))
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, 0) in (0, 40)
    assert lookup.loads_beside(request)
