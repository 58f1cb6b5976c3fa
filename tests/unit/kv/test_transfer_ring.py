"""What goes through shared memory, and what when it is not there, or not any more?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from pdtasks.kv import loading, ring, saving
from pdtasks.kv.plan import BlockLoad, Join, TransferPlan, TransferRecord
from pdtasks.kv.reports import Reporter, Reports
from pdtasks.kv.ring import Presence, RingError, RingReader, RingWriter, ring_name
from pdtasks.kv.rings import Rings
from tests.unit.kv.doubles import MemoryStore
from tests.unit.kv.vllm_worker import (
    BLOCK_BYTES,
    SLOT_BYTES,
    WIRE_BYTES,
    Side,
    a_handle,
    a_load,
    a_save,
    fill,
    payload_of,
)
from tests.waiting import wait_until


@pytest.fixture
def prefill(make_side: Callable[..., Side]) -> Side:
    """A side with a ring, that has computed something."""
    side = make_side(ring_slots=8)
    fill(side)
    return side


def saved(side: Side, store: MemoryStore) -> None:
    """All that is in the ring is in the store too."""
    store.let_go()
    wait_until(lambda: not side.transfer._ring._busy)  # type: ignore[union-attr]


def test_a_hand_over_does_not_wait_for_the_store(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    store.hold("touch", "put", "get")
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.finish(p=True)
    prefill.step_until(lambda: prefill.sent)

    decode.step(a_load(prefill.handed_over(handle), [1, 2, 4]))
    decode.step_until(lambda: decode.received)

    assert decode.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert store.num_gets == 0
    (record,) = prefill.records
    assert (record["blocks"], record["bytes"], record["error"]) == (3, 3 * BLOCK_BYTES, "")
    (record,) = decode.records
    assert (record["blocks"], record["bytes"], record["missing"]) == (3, 3 * BLOCK_BYTES, 0)


def test_what_is_in_the_ring_reaches_the_store_soon_and_once(
    prefill: Side, store: MemoryStore
) -> None:
    handle, computed = a_handle(), prefill.cache.clone()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    fill(prefill, seed=100)  # its blocks are another's by now
    saved(prefill, store)

    for index, block_id in enumerate([5, 0, 3]):
        assert payload_of(store, handle.key(index, 0)) == computed[block_id].tolist()
        assert len(store.values[handle.key(index, 0)]) == WIRE_BYTES
    # The same prompt again: only its own tail is sent.
    prefill.step(a_save(a_handle(name="t"), [5, 0, 3], request_id="q"))
    prefill.step_until(lambda: len(prefill.records) == 2)
    saved(prefill, store)
    assert sorted(store.puts) == sorted([handle.key(i, 0) for i in range(3)] + [handle.key(2, 0)])


def test_a_load_that_the_step_waits_for_is_there_when_it_begins(
    prefill: Side, decode: Side
) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)

    decode.transfer.start_loads(a_load(prefill.handed_over(handle), [1, 2, 4], join=Join.NOW))

    assert decode.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    decode.steps()
    assert not decode.received, "vLLM knows it already"


def test_a_slot_that_was_used_again_is_fetched_from_the_store(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    handle, computed = a_handle(), prefill.cache.clone()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    saved(prefill, store)
    handed = prefill.handed_over(handle)
    fill(prefill, seed=7)
    prefill.step(a_save(a_handle(7, name="u"), [0, 1, 2, 3, 4, 5, 6], request_id="q"))
    prefill.step_until(lambda: len(prefill.records) == 2)

    decode.step(a_load(handed, [1, 2, 4]))
    decode.step_until(lambda: decode.records)

    assert decode.cache[[1, 2, 4]].tolist() == computed[[5, 0, 3]].tolist()
    assert store.num_gets == 2, "the third is in the ring still"


def test_a_slot_with_another_block_is_not_taken_for_the_one_that_is_asked_for(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    saved(prefill, store)
    handed = prefill.handed_over(handle)

    # As if somebody had made the numbers up
    odd = msgspec.structs.replace(handed, numbers=((1, 1), (0, 1), (2, 1)))
    decode.step(a_load(odd, [1, 2, 4]))
    decode.step_until(lambda: decode.received)

    assert decode.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert store.num_gets == 2


def test_a_store_that_does_not_keep_up_holds_up_no_hand_over_that_was_read(
    make_side: Callable[..., Side], decode: Side, store: MemoryStore
) -> None:
    # Given a ring whose blocks all wait for the store
    side = make_side(ring_slots=8, num_threads=2)
    fill(side)
    store.hold("put")

    def hand_over(n: int) -> None:
        handle = a_handle(name=f"t{n}")
        side.step(a_save(handle, [5, 0, 3], request_id=f"p{n}"))
        side.step_until(lambda: len(side.records) == n + 1)
        decode.step(a_load(side.handed_over(handle, f"p{n}"), [1, 2, 4]))
        decode.step_until(lambda: len(decode.records) == n + 1)

    # When more come, and are read
    began = time.monotonic()
    for n in range(6):
        # (in other slots than the two that are being sent)
        side._next_number = 8 * n + (3 if n else 0)
        hand_over(n)

    assert time.monotonic() - began < 5
    assert not any(r["missing"] or r["error"] for r in decode.records + side.records)
    saved(side, store)
    side.step_until(lambda: side.unsent)


def test_what_nobody_has_read_is_sent_first_and_nothing_waits_for_ever(
    make_side: Callable[..., Side], decode: Side, store: MemoryStore
) -> None:
    side = make_side(ring_slots=100, num_threads=2)
    fill(side)
    store.hold("put")
    read, other = a_handle(8, name="a"), a_handle(8, name="b")
    side.step(a_save(read, list(range(8)), request_id="a"))
    side.step_until(lambda: len(side.records) == 1)
    decode.step(a_load(side.handed_over(read, "a"), list(range(8))))
    decode.step_until(lambda: decode.received)
    side.step(a_save(other, list(range(8)), request_id="b"))
    side.step_until(lambda: len(side.records) == 2)

    saved(side, store)

    assert len(store.puts) == 16
    of_other = {other.key(i, 0) for i in range(8)}
    # Two of the first may have been on their way already.
    assert of_other <= set(store.puts[:11])


def test_a_store_that_is_away_does_not_keep_engines_of_a_host_from_handing_over(
    prefill: Side, decode: Side, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.away = True
    for n in range(6):
        handle = a_handle(name=f"t{n}")
        prefill.step(a_save(handle, [5, 0, 3], request_id=f"p{n}"))
        prefill.step_until(lambda n=n: len(prefill.records) == n + 1)  # type: ignore[misc]
        decode.step(a_load(prefill.handed_over(handle, f"p{n}"), [1, 2, 4]))
        decode.step_until(lambda n=n: len(decode.records) == n + 1)  # type: ignore[misc]

    assert not any(r["error"] or r.get("missing") for r in prefill.records + decode.records)
    saved(prefill, store)
    # Each hand-over is not told of again.
    assert len(store.touched) < 6
    store.away = False


@pytest.mark.parametrize("ring", ["elsewhere", "used again"])
def test_an_engine_ends_rather_than_running_a_step_without_its_blocks(
    prefill: Side, decode: Side, ring: str
) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    handed = prefill.handed_over(handle)
    if ring == "elsewhere":
        handed = msgspec.structs.replace(handed, ring=ring)
    else:
        prefill.step(a_save(a_handle(7, name="u"), [0, 1, 2, 3, 4, 5, 6], request_id="q"))
        prefill.step_until(lambda: len(prefill.records) == 2)

    with pytest.raises(RuntimeError, match="was lost while its step waited"):
        decode.transfer.start_loads(a_load(handed, [1, 2, 4], join=Join.NOW))


def test_a_slot_that_a_step_depends_on_is_not_used_again_meanwhile() -> None:
    writer = a_writer(slots=4)
    reader = RingReader(writer.name)
    for number in range(4):
        slot = writer.take(number, time.monotonic())
        assert slot == number
        writer.publish(slot, number, 7)
        writer.release(slot)

    assert reader.keep([1, 2], seconds=0.3)
    assert writer.take(4, time.monotonic() + 5) == 0, "nobody keeps that one"
    assert writer.take(5, time.monotonic() + 0.05) is None
    assert reader.is_kept(1)
    # The next one waits until it may
    assert writer.take(6, time.monotonic() + 5) == 2
    assert not reader.is_kept(2)
    assert not reader.keep([2], seconds=0.3), "too late"
    reader.close()
    writer.close()


def test_what_a_step_has_loaded_is_kept_no_longer(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    rings = Rings(payloads=False)
    began = time.monotonic()
    # A ring that goes round every third time
    for n in range(30):
        handle = a_handle(name=f"t{n}")
        prefill.step(a_save(handle, [5, 0, 3], request_id=f"p{n}"))
        prefill.step_until(lambda n=n: len(prefill.records) == n + 1)  # type: ignore[misc]
        handed = prefill.handed_over(handle, f"p{n}")
        assert rings.keep(handed, 0, seconds=2.0)
        decode.step(a_load(handed, [1, 2, 4], join=Join.NOW))

    assert time.monotonic() - began < 2.0
    rings.close()


def test_another_host_waits_for_a_block_that_is_on_its_way(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    store.hold("put")
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    handed = msgspec.structs.replace(prefill.handed_over(handle), ring="elsewhere")

    decode.step(a_load(handed, [1, 2, 4]))
    wait_until(lambda: store.num_gets > 4)
    assert not decode.records
    store.let_go()

    decode.step_until(lambda: decode.received)
    assert not decode.failed
    assert decode.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()


@pytest.mark.parametrize("why", ["it is old", "it waited for the store", "it never comes"])
def test_a_block_that_is_not_on_its_way_is_not_waited_for_long(
    decode: Side, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(loading, "_ON_ITS_WAY_S", 0.2 if why == "it never comes" else 60.0)
    handle = msgspec.structs.replace(
        a_handle(),
        ring=None if why == "it waited for the store" else "elsewhere",
        made_at=time.time() - (3600 if why == "it is old" else 0),
    )

    decode.step(a_load(handle, [1, 2, 4]))

    decode.step_until(lambda: decode.failed)


def test_a_full_ring_waits_for_the_store_until_the_deadline(
    make_side: Callable[..., Side], store: MemoryStore
) -> None:
    side = make_side(ring_slots=2, timeout_s=0.3)
    store.hold("put")
    side.step(a_save(a_handle(4), [0, 1, 2, 3]))

    side.step_until(lambda: side.records)

    (record,) = side.records
    assert "too slow" in record["error"]
    assert record["blocks"] == 2
    side.finish(p=True)
    side.step_until(lambda: side.sent)


def test_a_prompt_that_is_longer_than_the_ring_is_saved_whole(
    make_side: Callable[..., Side], store: MemoryStore, decode: Side
) -> None:
    side = make_side(ring_slots=2)
    fill(side)
    handle = a_handle(8)
    side.step(a_save(handle, list(range(8))))
    side.step_until(lambda: side.records)
    saved(side, store)

    decode.step(a_load(side.handed_over(handle), list(range(8))))
    decode.step_until(lambda: decode.received)

    assert decode.cache.tolist() == side.cache.tolist()


def test_after_the_store_has_failed_it_rests_and_is_used_again(
    prefill: Side, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_REST_S", 0.1)
    store.away = True
    prefill.step(a_save(a_handle(name="a"), [5, 0, 3], request_id="a"))
    prefill.step_until(lambda: prefill.records)
    saved(prefill, store)
    store.away = False

    def stored() -> bool:
        name = f"b{time.monotonic()}"
        prefill.step(a_save(a_handle(name=name), [5, 0, 3], request_id=name))
        return bool(store.puts)

    wait_until(stored)


def test_a_host_without_room_hands_over_through_the_store(
    store: MemoryStore, decode: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "FOLDER", tmp_path / "none")
    side = Side(store, ring_slots=8)
    fill(side)
    handle = a_handle()
    side.step(a_save(handle, [5, 0, 3]))
    side.step_until(lambda: side.records)

    decode.step(a_load(side.handed_over(handle), [1, 2, 4]))
    decode.step_until(lambda: decode.received)

    assert not decode.failed
    assert len(store.puts) == 3
    side.finish(p=True)
    side.step_until(lambda: side.sent)
    side.transfer.close()


# -- the ring itself ---------------------------------------------------------------------------


def a_writer(slots: int = 4, name: str | None = None) -> RingWriter:
    name = name or ring_name(f"test-{os.getpid()}-{time.monotonic_ns()}", 0)
    return RingWriter(name, num_bytes=slots * SLOT_BYTES, block_bytes=64, pin=False)


def test_a_reader_knows_what_is_there_what_was_and_what_will_be() -> None:
    writer = a_writer()
    reader = RingReader(writer.name)
    try:
        for number in range(6):
            slot = writer.take(number, time.monotonic())
            assert slot is not None
            assert reader.presence(number) is Presence.NOT_YET
            writer.payload(slot)[:] = bytes([number]) * 64
            writer.publish(slot, number, 7)
            assert reader.presence(number) is Presence.HERE
            assert bytes(reader.payload(slot)) == bytes([number]) * 64
            writer.release(slot)

        assert [reader.presence(n) for n in (0, 1)] == [Presence.GONE] * 2
        assert [reader.presence(n) for n in range(2, 6)] == [Presence.HERE] * 4
        assert reader.presence(6) is Presence.NOT_YET
    finally:
        reader.close()
        writer.close()


def test_only_this_user_may_read_a_ring_and_it_goes_with_its_writer() -> None:
    writer = a_writer()
    path = ring.FOLDER / writer.name
    assert path.stat().st_mode & 0o777 == 0o600

    writer.close()

    assert not path.exists()


@pytest.mark.parametrize("name", ["../etc/passwd", "sem.x", "pdtasks-kv-../x", "pdtasks-kv-none-0"])
def test_a_name_that_is_none_of_ours_is_not_opened(name: str) -> None:
    with pytest.raises(RingError):
        RingReader(name)


def test_what_is_no_ring_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "FOLDER", tmp_path)
    for name, content in {"short": b"PDRB", "other": bytes(8192)}.items():
        (tmp_path / f"pdtasks-kv-{name}-0").write_bytes(content)
        with pytest.raises(RingError):
            RingReader(f"pdtasks-kv-{name}-0")


def test_what_a_killed_engine_leaves_is_read_on_and_then_removed() -> None:
    name = ring_name(f"test-{os.getpid()}-killed", 0)
    script = (
        "import sys, time; from pdtasks.kv.ring import RingWriter\n"
        f"w = RingWriter({name!r}, num_bytes=4 * 4096, block_bytes=64, pin=False)\n"
        "w.payload(w.take(0, time.monotonic()))[:] = b'x' * 64; w.publish(0, 0, 7)\n"
        "print('there', flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"there\n"
    ring.sweep()
    reader = RingReader(name)  # it lives: it is not swept away
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()

    ring.sweep()

    assert not (ring.FOLDER / name).exists()
    assert reader.presence(0) is Presence.HERE
    assert bytes(reader.payload(0)) == b"x" * 64
    reader.close()


@pytest.mark.parametrize("num_bytes", [0, SLOT_BYTES, 1 << 60])
def test_a_ring_that_has_no_room_says_what_to_set(num_bytes: int) -> None:
    with pytest.raises(RingError, match="PDTASKS_KV_RING_MIB"):
        RingWriter(
            ring_name(f"test-{os.getpid()}-large", 0),
            num_bytes=num_bytes,
            block_bytes=64,
            pin=False,
        )

    assert not (ring.FOLDER / ring_name(f"test-{os.getpid()}-large", 0)).exists()


# -- who is told -------------------------------------------------------------------------------


def test_the_end_of_a_transfer_is_heard_at_once_or_with_the_statistics() -> None:
    reports = Reports()
    tell = Reporter(reports.path)
    record = TransferRecord(request_id="r", op="save", rank=0, world=1, blocks=3, bytes=9)
    try:
        assert tell(record)
        (heard,) = reports.take()
        assert (heard["request_id"], heard["op"], heard["blocks"]) == ("r", "save", 3)
        assert reports.take() == []
    finally:
        reports.close()
    assert not tell(record), "nobody listens any more"
    tell.close()
    assert not Path(reports.path).parent.exists()


def test_a_record_that_was_heard_is_not_told_twice(
    make_side: Callable[..., Side],
) -> None:
    side = make_side()
    heard: list[TransferRecord] = []

    def hear(record: TransferRecord) -> bool:
        heard.append(record)
        return record.request_id == "p"

    side.transfer._ledger._report = hear
    side.step(a_save(a_handle(), [5, 0, 3]))
    side.step(a_save(a_handle(name="u"), [5, 0, 3], request_id="q"))
    side.step_until(lambda: side.records)
    side.step(TransferPlan())

    assert sorted(r.request_id for r in heard) == ["p", "q"]
    assert [r["request_id"] for r in side.records] == ["q"]


# -- under pressure ----------------------------------------------------------------------------


def test_a_step_does_not_wait_behind_what_comes_from_the_store(
    prefill: Side, make_side: Callable[..., Side], store: MemoryStore
) -> None:
    # Given threads that all wait for a store that hangs
    decode = make_side(num_threads=2)
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    store.hold("get")
    other = TransferPlan(
        loads=[BlockLoad(request_id="x", handle=a_handle(8, name="x"), first=0, block_ids=[0, 5])]
    )
    decode.step(other)
    wait_until(lambda: store.under_way["get"] == 2)

    began = time.monotonic()
    decode.step(a_load(prefill.handed_over(handle), [1, 2, 4], join=Join.NOW))

    assert time.monotonic() - began < 0.5
    assert decode.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    store.let_go()
    decode.step_until(lambda: decode.failed)


def test_two_blocks_never_have_one_slot() -> None:
    writer = a_writer(slots=2)
    taken: list[int] = []

    def take(number: int) -> None:
        slot = writer.take(number, time.monotonic() + 10)
        assert slot is not None
        taken.append(slot)
        assert taken.count(slot) == 1, "another has it"
        time.sleep(0.001)
        taken.remove(slot)
        writer.release(slot)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(take, number) for number in range(0, 200, 2)]:
            done.result()
    writer.close()
