"""How do blocks get into the engine's cache? (vLLM's worker side)

From the ring of an engine on this host if they are there, else from the store, where a block whose
hand-over left before it may still be on its way.  A block that is missing, late or damaged fails
the load of its request; the engine then computes the prompt itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from functools import partial

from vllm.logger import init_logger

from pdtasks.kv.codec import HEADER_BYTES, CorruptBlock, check, name_of
from pdtasks.kv.ledger import Ledger, Tally, keep
from pdtasks.kv.movers import Block, Movers, blocks_of
from pdtasks.kv.plan import BlockLoad, TransferPlan
from pdtasks.kv.ring import Presence, RingReader
from pdtasks.kv.rings import Rings
from pdtasks.kv.store import BlockStore, UnexpectedValue

logger = init_logger(__name__)

#: Seconds in which a block whose hand-over came before it may still reach the store.
_ON_ITS_WAY_S = 2.0
#: Seconds between two looks for one.
_FIRST_LOOK_S, _LAST_LOOK_S = 0.001, 0.02
#: Seconds for which the engine stands at most while it waits for what it cannot run without.
_SYNC_S = 1.0


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
        timeout_s: float,
    ) -> None:
        """`movers`: with stagings."""
        self._ledger = ledger
        self._store = store
        self._rings = rings
        self._fingerprint = fingerprint
        self._rank = rank
        self._movers = movers
        self._timeout_s = timeout_s
        self._ended = threading.Condition(ledger.lock)
        self.running: dict[str, Tally] = {}
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._invalid: set[int] = set()  # blocks of the cache that hold nothing of use

    # -- in the engine's thread ----------------------------------------------------------------

    def start(self, plan: TransferPlan) -> None:
        """Start fetching the blocks of the step's new requests.

        Returns when those are there without which this step cannot run.
        """
        waited_for: list[tuple[BlockLoad, Tally]] = []
        for load in plan.loads:
            tally = Tally(load.request_id, "load", open=len(load.block_ids), sealed=True)
            with self._ledger.lock:
                if not load.block_ids:
                    if not load.sync:
                        self._received.add(load.request_id)  # no thread would ever end it
                    continue
                self._running_as(load)[load.request_id] = tally
            if load.sync:
                waited_for.append((load, tally))
            within_s = _SYNC_S if load.sync else self._timeout_s
            deadline = time.monotonic() + within_s
            ring = self._rings.find(load.handle, self._rank)
            for block in blocks_of(load, self._rank, None, deadline):
                try:
                    self._movers.submit(partial(self._fetch, load, tally, block, ring))
                except RuntimeError as exc:  # closed
                    self._block_ended(load, tally, None, exc)
        for load, tally in waited_for:
            with self._ledger.lock:
                # Each block's way ends by its deadline.
                self._ended.wait_for(lambda tally=tally: tally.open == 0)  # type: ignore[misc]
                if tally.missing:
                    self._invalid.update(load.block_ids)
        if plan.loads:
            self._ledger.tell()

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

    def take_invalid(self) -> set[int]:
        """Blocks that a step ran with although they could not be loaded."""
        with self._ledger.lock:
            invalid, self._invalid = self._invalid, set()
        return invalid

    def leftovers(self) -> dict[str, Collection[object]]:
        """What is kept, by kind."""
        return {
            "loads": self.running,
            "received": self._received,
            "failed": self._failed,
            "invalid": self._invalid,
        }

    # -- in the threads ------------------------------------------------------------------------

    def _fetch(self, load: BlockLoad, tally: Tally, block: Block, ring: RingReader | None) -> None:
        error: Exception | None = None
        received: int | None = None
        try:
            # One block is missing: the prompt will be recomputed, the others are of no use.
            if not (tally.missing or tally.cancelled):
                keep(block.deadline)
                received = self._from_ring(block, ring) if ring is not None else None
                if received is None:
                    received = self._from_store(load, tally, block)
        except (CorruptBlock, UnexpectedValue) as exc:
            logger.warning("KV block %s is not usable: %s", block.key, exc)
            # Prefill would take it for a good one and never write it again.
            error = self._forget(block.key)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the prompt is recomputed
            error = exc
        self._block_ended(load, tally, received, error)

    def _from_ring(self, block: Block, ring: RingReader) -> int | None:
        """Returns the bytes, or None when the block is not there, or not any more."""
        number = block.number
        if number is None or ring.presence(number) is not Presence.HERE:
            return None
        slot = number % ring.num_slots
        if ring.name_of(slot) != name_of(block.content, self._fingerprint):
            logger.warning("a ring has another block than %s", block.key)
            return None
        payload = ring.payload(slot)
        self._movers.own.copier.scatter(block.block_id, payload)
        if ring.presence(number) is not Presence.HERE:
            return None
        ring.note_read(number)
        return len(payload)

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
        own.copier.scatter(block.block_id, payload)
        return HEADER_BYTES + len(payload)

    def _on_its_way_s(self, load: BlockLoad) -> float:
        """Seconds for which a block that the store lacks is worth waiting for."""
        if load.handle.ring is None:
            return 0.0  # that hand-over left when all blocks were there
        # By the clocks of two hosts.
        age = max(0.0, time.time() - load.handle.made_at)
        return _ON_ITS_WAY_S if age < self._timeout_s else 0.0

    def _forget(self, key: str) -> Exception | None:
        try:
            self._store.delete([key])
        except Exception as exc:  # noqa: BLE001 - whatever it is, the load has to end
            return exc
        return None

    def _block_ended(
        self, load: BlockLoad, tally: Tally, received: int | None, error: Exception | None
    ) -> None:
        with self._ledger.lock:
            tally.note(received, error)
            if received is None:
                tally.missing += 1
            if tally.open == 0:
                if not load.sync:
                    del self.running[tally.request_id]
                    self._received.add(tally.request_id)
                    if tally.missing:
                        self._failed.add(tally.request_id)
                self._ledger.record(tally)
                self._ended.notify_all()
        self._ledger.tell()

    def _running_as(self, load: BlockLoad) -> dict[str, Tally]:
        """Where the tally of `load` is kept: of what the engine waits for, nowhere."""
        return {} if load.sync else self.running
