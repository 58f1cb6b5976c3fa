"""How do blocks get from the engine's cache to the store? (vLLM's worker side)

Through a ring (`ring`) each block is copied and sealed first, and the request's blocks are free and
its hand-over can leave when all are there; from its slot each is then sent to the store, unless
that has it already.  Without one a thread copies a block only when it can be sent, and the
hand-over waits for the store.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import ceil

from vllm.logger import init_logger

from pdtasks.kv.codec import name_of, seal
from pdtasks.kv.ledger import Late, Ledger, Tally, describe, keep
from pdtasks.kv.marks import Marks
from pdtasks.kv.movers import Block, Movers, batches_of, blocks_of
from pdtasks.kv.plan import TransferPlan
from pdtasks.kv.ring import RingWriter
from pdtasks.kv.store import BlockStore

logger = init_logger(__name__)

#: Seconds without a further try after the store did not take a block out of the ring.
_REST_S = 1.0


#: Seconds for which an engine keeps blocks in its cache when their hand-over can leave: it would
#: give the places to the next prompt, and most readers come within 20 ms to copy from there.
_READ_S = 0.05
#: Seconds between two looks whether the engine stops.
_CLOSE_LOOK_S = 0.1


class _Rests(Exception):
    """The store has just refused, or did not answer."""


class _Question:
    """Which blocks of a step does the store have? Asked while they are copied."""

    def __init__(self, keys: list[str], deadline: float) -> None:
        self.keys = keys
        self.deadline = deadline
        self._answered = threading.Event()
        self._present: set[str] = set()

    def answer(self, present: Iterable[str] = ()) -> None:
        """It has those, or it is not known what it has: then all are sent."""
        self._present = set(present)
        self._answered.set()

    def has(self, key: str, closing: threading.Event) -> bool:
        """Waits for the answer, for as long as `closing` is not set."""
        while not self._answered.wait(_CLOSE_LOOK_S):
            if closing.is_set() or time.monotonic() >= self.deadline:
                break
        return key in self._present


class Saves:
    """The saves of one rank."""

    def __init__(
        self,
        ledger: Ledger,
        store: BlockStore,
        *,
        fingerprint: str,
        rank: int,
        senders: Movers,
        ring: RingWriter | None,
        copiers: Movers | None,
        askers: Movers,
        timeout_s: float,
        has_readers: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args:
        senders: speak to the store; without a ring they copy too, and need stagings.
        copiers: fill the ring.
        askers: ask the store what it has; never the senders, who wait for that.
        has_readers: is another engine on this host, which may read this one's cache?
        """
        self._ledger = ledger
        self._store = store
        self._fingerprint = fingerprint
        self._rank = rank
        self._senders = senders
        self._ring = ring
        self._copiers = copiers
        self._askers = askers
        self._timeout_s = timeout_s
        self._has_readers = has_readers
        self._copied = threading.Condition(ledger.lock)
        self.running: dict[str, Tally] = {}
        self._sent: dict[str, float] = {}  # saved, not reported; when they may be, monotonic
        self._held: set[str] = set()  # the scheduler keeps their blocks until they are saved
        self._waiting: dict[int, tuple[Block, _Question]] = {}  # by slot, to be sent
        self.num_unsent = 0  #: blocks that the store did not get because it did not keep up
        self._told_unsent = 0
        self._store_rests_until = 0.0  # monotonic
        self._closing = threading.Event()

    # -- in the engine's thread ----------------------------------------------------------------

    def take_unsent(self) -> int:
        """Blocks more that the store did not get, since the last call."""
        now = self.num_unsent
        before, self._told_unsent = self._told_unsent, now
        return now - before

    def start(self, plan: TransferPlan, after: Marks) -> None:
        """Start with the blocks that the step completes, at `after`."""
        with self._ledger.lock:
            for request_id, wanted in plan.finished.items():
                self._held.add(request_id)
                tally = self.running.get(request_id)
                if tally is None:
                    self._sent.setdefault(request_id, 0.0)  # also when its blocks were given up
                elif not wanted:
                    tally.cancelled = tally.sealed = True
                    self._end_if_done(tally)
        if not plan.saves:
            return
        deadline = time.monotonic() + self._timeout_s
        for save in plan.saves:
            with self._ledger.lock:
                tally = self.running.get(save.request_id)
                if tally is None:
                    tally = self.running[save.request_id] = Tally(save.request_id, "save")
                tally.open += len(save.block_ids)
                tally.sealed = save.last
                self._end_if_done(tally)  # the last one may bring no further block
            if blocks := list(blocks_of(save, self._rank, after, deadline)):
                self._start(tally, blocks, deadline)
        self._ledger.tell()

    def _start(self, tally: Tally, blocks: list[Block], deadline: float) -> None:
        if self._ring is None or self._copiers is None:
            done = partial(self._all_done, tally, blocks)
            self._submit(self._senders, partial(self._send_missing, tally, blocks), done)
            return
        asked = _Question([block.key for block in blocks if block.shared], deadline)
        with suppress(RuntimeError):  # closed
            self._askers.submit(self._ask, asked)
        # A prompt's tail is of one request, which deletes it when it ends: it goes first.  (Of a
        # prompt longer than the ring an earlier block would take its place.)
        if len(blocks) < self._ring.num_slots:
            blocks.sort(key=lambda block: block.shared)
        # All at once, in halves: each part of them is to leave as soon as it is computed.
        for batch in batches_of(blocks, ceil(len(blocks) / self._copiers.num_threads)):
            job = partial(self._copy_to_ring, self._ring, tally, deque(batch), asked)
            self._submit(self._copiers, job, partial(self._all_done, tally, batch))

    def give_up(self, request_ids: Collection[str]) -> None:
        """vLLM takes the blocks of these requests away; returns when nobody reads them any more.

        Waits for copies within the host, never for the network.
        """
        with self._ledger.lock:
            tallies = [self.running.pop(r) for r in request_ids if r in self.running]
            for tally in tallies:
                tally.cancelled = True
            for request_id in request_ids:
                self._sent.pop(request_id, None)  # saved already: will be saved again
            self._copied.wait_for(lambda: not any(tally.copying for tally in tallies))

    def close(self) -> None:
        """Send nothing more to the store that is not on its way."""
        self._closing.set()

    def take(self) -> set[str]:
        """Requests whose blocks are free since the last call. Called with the ledger's lock."""
        now = time.monotonic()
        sent = {name for name in self._held if self._sent.get(name, now + 1) <= now}
        self._held -= sent
        for request_id in sent:
            del self._sent[request_id]
        return sent

    def leftovers(self) -> dict[str, Collection[str]]:
        """What is kept, by kind."""
        return {"saves": self.running, "sent": self._sent, "held": self._held}

    # -- with a ring ---------------------------------------------------------------------------

    def _copy_to_ring(
        self, ring: RingWriter, tally: Tally, blocks: deque[Block], asked: _Question
    ) -> None:
        while blocks:
            taken: list[tuple[int, Block]] = []  # slots, for what
            error: Exception | None = None
            copied = False
            try:
                if not self._is_pointless(tally):
                    self._take_slots(ring, blocks, taken)
                    copied = self._copy_into(ring, tally, taken)
            except Exception as exc:  # noqa: BLE001 - whatever it is, decode will recompute
                error = exc
            if not copied:
                for slot, _ in taken:
                    ring.release(slot)
                self._all_done(tally, [block for _, block in taken] + list(blocks), None, error)
                return
            self._all_done(tally, [block for _, block in taken], ring.block_bytes, None)
            for slot, block in taken:
                self._send_soon(ring, slot, block, asked)

    def _take_slots(
        self, ring: RingWriter, blocks: deque[Block], taken: list[tuple[int, Block]]
    ) -> None:
        """Wait for the first block's slot, and take those of the next that are free.

        Whoever has a slot never waits for another: two could wait for each other.
        """
        deadline = blocks[0].deadline
        while blocks:
            number = blocks[0].number
            assert number is not None
            slot = ring.take(number, deadline, self._give_up_sending)
            if slot is None:
                break
            taken.append((slot, blocks.popleft()))
            deadline = time.monotonic()
        if not taken:
            raise Late

    def _copy_into(self, ring: RingWriter, tally: Tally, taken: list[tuple[int, Block]]) -> bool:
        with self._ledger.lock:
            if tally.cancelled:  # its blocks may be another's by now
                return False
            tally.copying += 1
        try:
            first = taken[0][1]
            keep(first.deadline)
            assert self._copiers is not None
            copies = [(block.block_id, ring.payload(slot)) for slot, block in taken]
            self._copiers.own.copier.gather(copies, first.after, pinned=ring.pinned)
            # Now: once nothing is copied, the place in the cache may become another block's.
            for slot, block in taken:
                assert block.number is not None
                name = name_of(block.content, self._fingerprint)
                ring.publish(slot, block.number, name, place=block.block_id)
        finally:
            with self._ledger.lock:
                tally.copying -= 1
                self._copied.notify_all()
        return True

    def _send_soon(self, ring: RingWriter, slot: int, block: Block, asked: _Question) -> None:
        with self._ledger.lock:
            self._waiting[slot] = block, asked
        try:
            self._senders.submit(self._send_next, ring)
        except RuntimeError:  # closed
            ring.release(slot)

    def _ask(self, asked: _Question) -> None:
        present: list[str] = []
        try:
            self._require_store()
            keep(asked.deadline)
            found = self._store.touch(asked.keys)
            present = [key for key, there in zip(asked.keys, found, strict=True) if there]
        except Exception as exc:  # noqa: BLE001 - no answer is an answer
            self._let_store_rest(exc)
        asked.answer(present)

    def _give_up_sending(self, slot: int) -> bool:
        """Leave what is in `slot` to who has read it: the store does not keep up."""
        with self._ledger.lock:
            if slot not in self._waiting or not self._is_read(slot):
                return False
            del self._waiting[slot]
        self.num_unsent += 1
        return True

    def _is_read(self, slot: int) -> bool:
        return self._ring is not None and self._ring.was_read(slot)

    def _send_next(self, ring: RingWriter) -> None:
        """Send a block from the ring to the store, beside everything else."""
        with self._ledger.lock:
            if not self._waiting:
                return  # given up
            # First what nobody has read yet: another host may wait for it.
            unread = (slot for slot in self._waiting if not self._is_read(slot))
            slot = next(unread, next(iter(self._waiting)))
            block, asked = self._waiting.pop(slot)
        error = None
        try:
            self._require_store()
            keep(block.deadline)
            if not asked.has(block.key, self._closing):
                payload = ring.payload(slot)
                header = seal(block.content, payload, self._fingerprint)
                self._store.put(block.key, [memoryview(header), payload], block.deadline)
        except Exception as exc:  # noqa: BLE001 - whoever needs it from there recomputes
            error = exc
        ring.release(slot)
        if error is not None:
            self._let_store_rest(error)

    def _let_store_rest(self, error: Exception) -> None:
        """Behind a store that hangs or is away each would wait in a slot that others need."""
        self.num_unsent += 1
        if not isinstance(error, _Rests | Late):
            self._store_rests_until = time.monotonic() + _REST_S
            logger.warning("KV blocks did not reach the store: %s", describe(error))

    def _require_store(self) -> None:
        if time.monotonic() < self._store_rests_until or self._closing.is_set():
            raise _Rests

    # -- without -------------------------------------------------------------------------------

    def _send_missing(self, tally: Tally, blocks: list[Block]) -> None:
        """Send those of `blocks` that the store does not have."""
        try:
            # Behind a store that hangs each of these would hang as long.
            keep(blocks[0].deadline)
            shared = [block.key for block in blocks if block.shared]
            present = dict(zip(shared, self._store.touch(shared), strict=True))
        except Exception as exc:  # noqa: BLE001 - whatever it is, decode will recompute
            self._all_done(tally, blocks, None, exc)
            return
        for block in blocks:
            if present.get(block.key):
                self._done(tally, 0)
            else:
                job = partial(self._send, tally, block)
                self._submit(self._senders, job, partial(self._done, tally))

    def _send(self, tally: Tally, block: Block) -> None:
        try:
            sent = self._copy_and_send(tally, block)
        except Exception as exc:  # noqa: BLE001 - whatever it is, decode will recompute
            self._done(tally, None, exc)
        else:
            self._done(tally, sent)

    def _copy_and_send(self, tally: Tally, block: Block) -> int | None:
        """Returns the bytes sent; None when it is pointless."""
        own = self._senders.own
        with self._ledger.lock:
            # One block of the prompt was refused: decode will recompute all of it.
            if tally.cancelled or tally.error:
                return None
            tally.copying += 1
        try:
            keep(block.deadline)
            copy = [(block.block_id, own.staging.payload)]
            own.copier.gather(copy, block.after, pinned=True)
        finally:
            with self._ledger.lock:
                tally.copying -= 1
                self._copied.notify_all()
        header = seal(block.content, own.staging.payload, self._fingerprint)
        self._store.put(block.key, [memoryview(header), own.staging.payload], block.deadline)
        return len(header) + len(own.staging.payload)

    def _reads_directly(self) -> bool:
        """May somebody copy out of the engine's cache?"""
        return self._ring is not None and bool(self._ring.regions) and self._has_readers()

    # -- both ----------------------------------------------------------------------------------

    def _is_pointless(self, tally: Tally) -> bool:
        with self._ledger.lock:
            return tally.cancelled or bool(tally.error)

    def _submit(
        self,
        movers: Movers,
        job: Callable[[], None],
        failed: Callable[[None, Exception], None],
    ) -> None:
        try:
            movers.submit(job)
        except RuntimeError as exc:  # closed: the engine's thread must not end of it
            failed(None, exc)

    def _all_done(
        self,
        tally: Tally,
        blocks: Sequence[Block],
        moved: int | None,
        error: Exception | None = None,
    ) -> None:
        with self._ledger.lock:
            for _ in blocks:
                tally.note(moved, error)
            self._end_if_done(tally)
        self._ledger.tell()

    def _done(self, tally: Tally, moved: int | None, error: Exception | None = None) -> None:
        with self._ledger.lock:
            tally.note(moved, error)
            self._end_if_done(tally)
        self._ledger.tell()

    def _end_if_done(self, tally: Tally) -> None:
        # A tally that was given up is in the list no more: its blocks belong to others now.
        if tally.sealed and tally.open == 0 and self.running.get(tally.request_id) is tally:
            is_read_here = self._reads_directly() and not tally.cancelled
            del self.running[tally.request_id]
            self._sent[tally.request_id] = time.monotonic() + is_read_here * _READ_S
            self._ledger.record(tally)
