"""How do blocks get from the engine's cache to other engines and back? (vLLM's worker side)

Theory of operation
-------------------
The engine's thread only says what is to be done; it never copies and never waits for the network.
A fixed number of threads do it, with a fixed amount of memory, so neither memory nor bytes under
way can grow, however slow the store is:

    save    copy out of the cache into a slot of the ring: others can read it
            -> checksum -> send it to the store, unless that has it
    load    from the ring of an engine of this host: copy into the cache
            from the store: receive -> check -> copy into the cache

The engine keeps the blocks of a finished request until they are in the ring (without a ring: in
the store), so a slow store costs the hand-over time and the engine some room in its cache, until
the deadline.  Blocks that vLLM takes away earlier, from a preempted request, are given up before
they are overwritten (`give_up`): bytes of another request must never be stored under their name.

A load from a ring is so short that the engine may wait for it and run the request in the same step,
or count on its end before it is there (`Join`); those from the store go on beside its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from pdtasks.kv.device_memory import DeviceMemoryError, SharedRegion, open_peer, share
from pdtasks.kv.ledger import Ledger
from pdtasks.kv.loading import Loads
from pdtasks.kv.marks import StepMarks
from pdtasks.kv.movers import Movers
from pdtasks.kv.pages import BlockPages, ManyCopies
from pdtasks.kv.plan import TransferPlan, TransferRecord, TransferStats
from pdtasks.kv.ring import RingError, RingWriter, ring_name
from pdtasks.kv.rings import Rings
from pdtasks.kv.saving import Saves
from pdtasks.kv.store import BlockStore

logger = init_logger(__name__)

#: Threads that copy between cache and rings, in each direction: two fill a GPU's link, and each
#: more costs the engine's thread.
_COPIERS = 2
#: Seconds between two looks for transfers that never end, and how old those are.
_LOOK_S = 60.0
_LEAKED_AFTER_S = 1800.0


class BlockTransfer:
    """Carries out `TransferPlan`s for one rank."""

    def __init__(
        self,
        store: BlockStore,
        *,
        fingerprint: str,
        rank: int,
        world: int,
        num_threads: int,
        timeout_s: float,
        engine_id: str = "",
        ring_bytes: int = 0,
        gpu_to_gpu: bool = True,
        soon_bytes: int = 0,
        report: Callable[[TransferRecord], bool] | None = None,
    ) -> None:
        """Args:
        num_threads: blocks that move at once, in each direction; each takes a block of host memory
            (pinned on CUDA) and a connection.
        timeout_s: seconds that the blocks of one step may take.
        engine_id: names the ring.
        ring_bytes: of shared memory for the ring; 0: none.
        gpu_to_gpu: let engines of this host read this one's cache, and read theirs.
        soon_bytes: what may be missing of a load that is said to be done soon (`Join.SOON`).
        report: see `Ledger`.
        """
        self._store = store
        self._fingerprint = fingerprint
        self._rank = rank
        self._num_threads = num_threads
        self._timeout_s = timeout_s
        self.engine_id = engine_id
        self._ring_bytes = ring_bytes
        self._gpu_to_gpu = gpu_to_gpu
        self._soon_bytes = soon_bytes
        self._ledger = Ledger(rank, world, report)
        self._ring: RingWriter | None = None
        self._rings: Rings | None = None
        self._movers: list[Movers] = []
        self._marks: StepMarks
        self._saves: Saves
        self._loads: Loads
        self._looked_at = time.monotonic()

    def attach(self, pages: BlockPages) -> None:
        """Tell where the cache lies; called once before any transfer."""
        cuda = pages.device.type == "cuda"
        self._marks = StepMarks(pages)
        self._ring = self._make_ring(pages, pin=cuda)
        ring = self._ring
        rings = self._rings = Rings(
            payloads=True,
            pin=cuda,
            open_memory=partial(open_peer, device=pages.device) if self._reads(pages) else None,
            own_engine=self.engine_id,
            on_unreachable=ring.reaches_no_more if ring is not None else lambda: None,
        )
        loaders = senders = self._new_movers("kv-transfer", pages, staging=True)
        copiers, askers = None, loaders
        if self._ring is not None:
            senders = self._new_movers("kv-transfer-send", pages, staging=False)
            copiers = self._new_movers(
                "kv-transfer-copy", pages, staging=False, num_threads=_COPIERS
            )
            askers = self._new_movers("kv-transfer-ask", pages, staging=False, num_threads=1)
        self._saves = Saves(
            self._ledger,
            self._store,
            fingerprint=self._fingerprint,
            rank=self._rank,
            senders=senders,
            ring=self._ring,
            copiers=copiers,
            askers=askers,
            timeout_s=self._timeout_s,
            has_readers=lambda: rings.has_others,
        )
        self._loads = Loads(
            self._ledger,
            self._store,
            self._rings,
            fingerprint=self._fingerprint,
            rank=self._rank,
            movers=loaders,
            copiers=self._new_movers(
                "kv-transfer-ring", pages, staging=False, num_threads=_COPIERS
            ),
            soon_blocks=self._soon_bytes // pages.block_bytes,
            timeout_s=self._timeout_s,
        )

    def _reads(self, pages: BlockPages) -> bool:
        """Can this engine copy from other engines' GPUs?"""
        return self._gpu_to_gpu and ManyCopies.can_copy(pages)

    def _make_ring(self, pages: BlockPages, *, pin: bool) -> RingWriter | None:
        if not self._ring_bytes:
            return None
        try:
            return RingWriter(
                ring_name(self.engine_id, self._rank),
                num_bytes=self._ring_bytes,
                block_bytes=pages.block_bytes,
                pin=pin,
                regions=self._share(pages),
            )
        except RingError as exc:
            logger.warning("hand-overs go through the store alone, which is slower: %s", exc)
            return None

    def _share(self, pages: BlockPages) -> list[SharedRegion]:
        """Let other engines read the cache; nothing where that cannot be."""
        # What vLLM clears before a step begins, a reader would take for what was there.
        if not self._reads(pages) or pages.is_cleared:
            return []
        try:
            return share(pages.regions)
        except DeviceMemoryError as exc:
            logger.warning("no copies from GPU to GPU: hand-overs go through host memory (%s)", exc)
            return []

    def _new_movers(
        self, name: str, pages: BlockPages, *, staging: bool, num_threads: int | None = None
    ) -> Movers:
        num_threads = num_threads or self._num_threads
        self._movers.append(Movers(name, num_threads, pages, staging=staging))
        return self._movers[-1]

    # -- in the engine's thread ----------------------------------------------------------------

    def start_saves(self, plan: TransferPlan) -> None:
        """All of the step is queued: start saving the blocks that it completes."""
        self._saves.start(plan, self._marks.end() if plan.saves else ())

    def before_step(self, plan: TransferPlan) -> None:
        """The step begins: nothing that it reads is missing, nothing that it writes being copied.

        See `Saves.give_up` and `Loads.before_step`.
        """
        # Not in `start_loads`: vLLM 0.32 calls that behind the forward pass unless a load is the
        # step's own.
        self._marks.begin(saves=bool(plan.saves))
        self._saves.give_up(plan.preempted)
        if self._ring is not None:
            self._ring.forget(plan.written)
        self._loads.before_step(plan)

    def start_loads(self, plan: TransferPlan) -> None:
        """Start fetching the blocks of the step's new requests; see `Loads.start`."""
        self._loads.start(plan)

    def layer_done(self, layer: str) -> None:
        """This layer's part of the step is queued."""
        self._marks.layer_done(layer)

    def take_results(self, finished_request_ids: set[str]) -> KVConnectorTransferResults:
        """What is done since the last call; each request is reported exactly once."""
        with self._ledger.lock:
            self._loads.cancel(finished_request_ids)
            leaked = self._leaked()
            sent = self._saves.take()
            received, failed = self._loads.take()
        if leaked:
            logger.warning("%d KV transfers never end: please report this", leaked)
        return KVConnectorTransferResults(sent, received, failed)

    def take_stats(self) -> TransferStats | None:
        """What there is to tell since the last call, and nobody was told at once."""
        records = [asdict(record) for record in self._ledger.take()]
        stats = TransferStats({"records": records, "unsent": self._saves.take_unsent()})
        return None if stats.is_empty() else stats

    # ------------------------------------------------------------------------------------------

    def look_for_rings(self) -> None:
        """Open the rings that have come to this host. For any thread."""
        if self._rings is not None:
            self._rings.look()

    def _leaked(self) -> int:
        """Transfers that are older than any request. Looked for now and then."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return 0
        self._looked_at = now
        tallies = [*self._saves.running.values(), *self._loads.running.values()]
        return sum(now - tally.started > _LEAKED_AFTER_S for tally in tallies)

    def leftovers(self) -> dict[str, int]:
        """How much is kept, by kind; nothing when all requests have ended and were reported."""
        with self._ledger.lock:
            kept = {**self._saves.leftovers(), **self._loads.leftovers()}
            return {name: len(those) for name, those in kept.items() if those}

    def close(self) -> None:
        """Wait for transfers under way, then close the connections and free the memory."""
        if self._movers:
            self._saves.close()
        for movers in reversed(self._movers):
            movers.close()
        self._movers = []
        if self._rings is not None:
            self._rings.close()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._store.close()
