"""How do blocks get into the engine's cache? (vLLM's worker side)

From the ring of an engine on this host if they are there, else from the store, where a block whose
hand-over left before it may still be on its way.  A block that is missing, late or damaged fails
the load of its request; the engine then computes the prompt itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

from vllm.logger import init_logger

from pdtasks.kv.codec import HEADER_BYTES, CorruptBlock, check, name_of
from pdtasks.kv.ledger import Ledger, Tally, keep
from pdtasks.kv.movers import Block, Movers, batches_of, blocks_of
from pdtasks.kv.plan import BlockLoad, Join, TransferPlan
from pdtasks.kv.ring import Presence, RingReader, has_writer
from pdtasks.kv.rings import Rings
from pdtasks.kv.store import BlockStore, UnexpectedValue

logger = init_logger(__name__)

#: Seconds in which a block whose hand-over came before it may still reach the store.
_ON_ITS_WAY_S = 2.0
#: Seconds between two looks for one.
_FIRST_LOOK_S, _LAST_LOOK_S = 0.001, 0.02
#: Bytes that are copied at once from a ring: 5 to 6 ms on a GPU's link.
_BATCH_BYTES = 256 << 20
#: Seconds after which an engine is given up that waits for what its step depends on: copies within
#: the host take milliseconds, but a host may stand still for a while.
_SYNC_S = 30.0


class Loads:
    """The loads of one rank."""

    def __init__(
        self,
        ledger: Ledger,
        store: BlockStore,
        rings: Rings,
        *,
        fingerprint: str,
        rank: int,
        movers: Movers,
        copiers: Movers,
        soon_blocks: int,
        timeout_s: float,
    ) -> None:
        """Args:
        movers: speak to the store; with stagings.
        copiers: read rings, and never wait for the store: a step may wait for them.
        soon_blocks: what may be missing of a load that is told (`Join.SOON`).
        """
        self._ledger = ledger
        self._store = store
        self._rings = rings
        self._fingerprint = fingerprint
        self._rank = rank
        self._movers = movers
        self._copiers = copiers
        self._soon_blocks = soon_blocks
        self._timeout_s = timeout_s
        self._ended = threading.Condition(ledger.lock)
        self.running: dict[str, Tally] = {}
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._lost: set[str] = set()  # told, and not all there

    # -- in the engine's thread ----------------------------------------------------------------

    def before_step(self, plan: TransferPlan) -> None:
        """Have the blocks ready that the step reads, and left alone those that it may write.

        Starts the loads whose requests join soon: what is copied first is there first.
        """
        for request_id in plan.left:
            self._leave(request_id)
        for request_id in plan.joined:
            self._wait_for(request_id, self.running.get(request_id))
        for load in plan.loads:
            if load.join is Join.SOON and load.block_ids:
                self._start(load)

    def start(self, plan: TransferPlan) -> None:
        """Start fetching the blocks of the step's other new requests.

        Returns when those are there without which this step cannot run.
        """
        tallies = [
            (load, self._start(load))
            for load in plan.loads
            if load.block_ids and load.join is not Join.SOON
        ]
        with self._ledger.lock:  # no thread would ever end these
            self._received |= {
                load.request_id
                for load in plan.loads
                if not (load.block_ids or load.join is Join.NOW)
            }
        for load, tally in tallies:
            if load.join is Join.NOW:
                self._wait_for(load.request_id, tally)
        if plan.loads or plan.joined:
            self._ledger.tell()

    def _start(self, load: BlockLoad) -> Tally:
        # (The first use of a ring may take a second: it is not in the load's time.)
        ring = self._rings.find(load.handle, self._rank)
        tally = Tally(load.request_id, "load", open=len(load.block_ids), sealed=True)
        is_kept = load.join is not Join.THERE
        with self._ledger.lock:
            self.running[load.request_id] = tally
            if ring is not None:
                self._tell_soon(load, tally)
        deadline = time.monotonic() + (_SYNC_S if is_kept else self._timeout_s)
        blocks = list(blocks_of(load, self._rank, (), deadline))
        if is_kept:
            self._start_kept(load, tally, blocks, ring)
            return tally
        for block in blocks:
            try:
                if ring is not None:
                    self._copiers.submit(self._fetch_from_ring, load, tally, block, ring)
                else:
                    self._movers.submit(self._fetch, load, tally, block)
            except RuntimeError as exc:  # closed
                self._ended_with(load, tally, 1, None, exc)
        return tally

    def _start_kept(
        self, load: BlockLoad, tally: Tally, blocks: list[Block], ring: RingReader | None
    ) -> None:
        size = max(1, _BATCH_BYTES // ring.block_bytes) if ring is not None else len(blocks)
        for batch in batches_of(blocks, size):
            try:
                if ring is None:
                    self._ended_with(load, tally, len(batch), None)
                else:
                    self._copiers.submit(self._fetch_kept, load, tally, batch, ring)
            except RuntimeError as exc:  # closed
                self._ended_with(load, tally, len(batch), None, exc)

    def _tell_soon(self, load: BlockLoad, tally: Tally) -> None:
        """The engine needs a step or two until the request is in one: tell it so much before.

        Called with the lock.
        """
        is_well = not (tally.told or tally.missing or tally.cancelled)
        if load.join is Join.SOON and is_well and tally.open <= self._soon_blocks:
            tally.told = True
            self._received.add(load.request_id)

    def _leave(self, request_id: str) -> None:
        """Copy nothing more for a request that has ended."""
        with self._ledger.lock:
            self._lost.discard(request_id)
            tally = self.running.get(request_id)
            if tally is None:
                return
            tally.cancelled = True
            if not self._ended.wait_for(lambda: tally.copying == 0, _SYNC_S):
                raise RuntimeError(f"a copy for {request_id} does not end")

    def _wait_for(self, request_id: str, tally: Tally | None) -> None:
        """Return when all that `tally` counts is there; None: it has ended before.

        Raises RuntimeError, which ends the engine, when it is not: vLLM 0.32 cannot take a request
        back that its step has begun with, and would answer it, and those that share its prefix, out
        of memory that holds something else.  `BlockLookup` has seen the blocks and has them kept,
        so this takes a fault that nobody knows of; the jobs go to another engine.
        """
        with self._ledger.lock:
            if tally is not None:
                left = tally.started + _SYNC_S - time.monotonic()
                self._ended.wait_for(lambda: tally.open == 0, max(0.0, left))
            is_lost = request_id in self._lost
            self._lost.discard(request_id)
            if not is_lost and (tally is None or tally.open == 0):
                return
        raise RuntimeError(f"the KV of {request_id} was lost while its step waited for it")

    def cancel(self, request_ids: Collection[str]) -> None:
        """Nobody wants these any more. Called with the ledger's lock."""
        for request_id in request_ids:
            if tally := self.running.get(request_id):
                tally.cancelled = True

    def take(self) -> tuple[set[str], set[str]]:
        """Requests whose loads ended since the last call, and of these the failed ones.

        Called with the ledger's lock.
        """
        received, self._received = self._received, set()
        failed, self._failed = self._failed, set()
        return received, failed

    def leftovers(self) -> dict[str, Collection[object]]:
        """What is kept, by kind."""
        return {
            "loads": self.running,
            "received": self._received,
            "failed": self._failed,
            "lost": self._lost,
        }

    # -- in the threads ------------------------------------------------------------------------

    def _fetch_from_ring(
        self, load: BlockLoad, tally: Tally, block: Block, ring: RingReader
    ) -> None:
        error: Exception | None = None
        is_here = False
        try:
            if not (tally.missing or tally.cancelled):
                keep(block.deadline)
                is_here = self._from_ring(load, tally, [block], ring)
                if not is_here:
                    self._movers.submit(self._fetch, load, tally, block)
                    return
        except Exception as exc:  # noqa: BLE001 - whatever it is, the prompt is recomputed
            error = exc
        self._ended_with(load, tally, 1, ring.block_bytes if is_here else None, error)

    def _fetch_kept(
        self, load: BlockLoad, tally: Tally, blocks: Sequence[Block], ring: RingReader
    ) -> None:
        error: Exception | None = None
        are_here = False
        try:
            keep(blocks[0].deadline)
            are_here = self._from_ring(load, tally, blocks, ring)
        except Exception as exc:  # noqa: BLE001 - whatever it is, their step says so
            error = exc
        self._ended_with(load, tally, len(blocks), ring.block_bytes if are_here else None, error)

    def _fetch(self, load: BlockLoad, tally: Tally, block: Block) -> None:
        error: Exception | None = None
        received: int | None = None
        try:
            # One block is missing: the prompt will be recomputed, the others are of no use.
            if not (tally.missing or tally.cancelled):
                keep(block.deadline)
                received = self._from_store(load, tally, block)
        except (CorruptBlock, UnexpectedValue) as exc:
            logger.warning("KV block %s is not usable: %s", block.key, exc)
            # Prefill would take it for a good one and never write it again.
            error = self._forget(block.key)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the prompt is recomputed
            error = exc
        self._ended_with(load, tally, 1, received, error)

    def _from_ring(
        self, load: BlockLoad, tally: Tally, blocks: Sequence[Block], ring: RingReader
    ) -> bool:
        """False: one of the blocks is not there, or not any more; or nobody wants them."""
        numbers = [block.number for block in blocks if block.number is not None]
        if len(numbers) < len(blocks) or not self._stay(load, numbers, ring):
            return False
        copies: list[tuple[int, memoryview]] = []
        for block, number in zip(blocks, numbers, strict=True):
            slot = number % ring.num_slots
            if ring.name_of(slot) != name_of(block.content, self._fingerprint):
                logger.warning("a ring has another block than %s", block.key)
                return False
            copies.append((block.block_id, ring.payload(slot)))
        if not self._from_peer(tally, blocks, numbers, ring):
            copier = self._copiers.own.copier
            if not self._scatter(tally, partial(copier.scatter, copies, pinned=ring.pinned)):
                return False
            if not self._stay(load, numbers, ring):
                return False
        for number in numbers:
            ring.note_read(number)
        return True

    def _from_peer(
        self, tally: Tally, blocks: Sequence[Block], numbers: list[int], ring: RingReader
    ) -> bool:
        """Copy from GPU to GPU. False: not all of it can be, or another block came in between."""
        peer = self._rings.peer(ring)
        places = [place for number in numbers if (place := ring.cached_at(number)) is not None]
        if peer is None or len(places) < len(numbers) or not has_writer(ring.name):
            return False
        copies = [(block.block_id, place) for block, place in zip(blocks, places, strict=True)]
        copier = self._copiers.own.copier
        with peer.use() as rows:
            if rows is None:
                return False
            try:
                copy = partial(copier.scatter_from_peer, copies, rows)
                if not self._scatter(tally, copy):
                    return False
            except RuntimeError as exc:  # CUDA's: the slots have them as well
                if has_writer(ring.name):  # else it has ended meanwhile
                    self._rings.unreachable(exc)
                return False
        return places == [ring.cached_at(number) for number in numbers]

    def _stay(self, load: BlockLoad, numbers: list[int], ring: RingReader) -> bool:
        """Are those blocks in their slots? Kept ones are, also while their word is away."""
        is_kept = load.join is not Join.THERE
        return all(
            ring.presence(number) is Presence.HERE
            or (is_kept and ring.is_kept(number % ring.num_slots))
            for number in numbers
        )

    def _from_store(self, load: BlockLoad, tally: Tally, block: Block) -> int | None:
        """Returns the bytes, or None when the store lacks the block.

        Raises CorruptBlock and UnexpectedValue.
        """
        own = self._movers.own
        payload = own.staging.payload
        until = min(block.deadline, time.monotonic() + self._on_its_way_s(load))
        pause_s = _FIRST_LOOK_S
        while not self._store.get(block.key, [own.header, payload], block.deadline):
            if tally.missing or tally.cancelled or time.monotonic() + pause_s >= until:
                return None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_LOOK_S)
        check(own.header, block.content, payload, self._fingerprint)
        copies = [(block.block_id, payload)]
        if not self._scatter(tally, partial(own.copier.scatter, copies, pinned=True)):
            return None
        return HEADER_BYTES + len(payload)

    def _scatter(self, tally: Tally, copy: Callable[[], None]) -> bool:
        """False: nobody waits for the blocks, whose places may be another's."""
        with self._ledger.lock:
            if tally.cancelled:
                return False
            tally.copying += 1
        try:
            copy()
        finally:
            with self._ledger.lock:
                tally.copying -= 1
                self._ended.notify_all()
        return True

    def _on_its_way_s(self, load: BlockLoad) -> float:
        """Seconds for which a block that the store lacks is worth waiting for."""
        if load.handle.ring is None:
            return 0.0  # that hand-over left when all blocks were there
        # By the clocks of two hosts.
        age = abs(time.time() - load.handle.made_at)
        return _ON_ITS_WAY_S if age < self._timeout_s else 0.0

    def _forget(self, key: str) -> Exception | None:
        try:
            self._store.delete([key])
        except Exception as exc:  # noqa: BLE001 - whatever it is, the load has to end
            return exc
        return None

    def _ended_with(
        self,
        load: BlockLoad,
        tally: Tally,
        num_blocks: int,
        received: int | None,
        error: Exception | None = None,
    ) -> None:
        """`num_blocks` have ended, each with so many bytes; None: they are not there."""
        with self._ledger.lock:
            for _ in range(num_blocks):
                tally.note(received, error)
                if received is None:
                    tally.missing += 1
            self._tell_soon(load, tally)
            if tally.open == 0:
                del self.running[tally.request_id]
                self._conclude(load, tally)
                self._ledger.record(tally)
                self._ended.notify_all()
        self._ledger.tell()

    def _conclude(self, load: BlockLoad, tally: Tally) -> None:
        """Note how it has ended, for whoever asks next. Called with the lock."""
        if load.join is Join.NOW or tally.told:
            if tally.missing and not tally.cancelled:
                self._lost.add(tally.request_id)
            return
        self._received.add(tally.request_id)
        if tally.missing:
            self._failed.add(tally.request_id)
