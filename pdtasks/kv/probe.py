"""How much of a prompt does the store have already?

The scheduler may not wait for the network.  It starts a probe when a request arrives and asks for
the answer each time it considers the request; until there is one, other requests go first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from vllm.logger import init_logger

from pdtasks.kv.store import BlockStore

logger = init_logger(__name__)

#: Seconds that a request waits for the answer; longer than that the store is no help.
PROBE_TIMEOUT_S = 0.25
#: Seconds without probes after one that failed: a store that is away delays few requests.
_REST_S = 5.0


class PrefixProbe:
    """Asks a store for prefixes, in a thread of its own."""

    def __init__(self, store: BlockStore) -> None:
        """Args:
        store: its `timeout_s` should be `PROBE_TIMEOUT_S`.
        """
        self._store = store
        self._thread = ThreadPoolExecutor(1, "kv-probe")
        self._asked: dict[str, tuple[Future[int], float]] = {}
        self._resume_at = 0.0

    def start(self, request_id: str, blocks: Sequence[Sequence[str]]) -> None:
        """Look for the leading `blocks` of a prompt, each given by its names (one for each rank).

        Those found get a new TTL.
        """
        if blocks and time.monotonic() >= self._resume_at:
            deadline = time.monotonic() + PROBE_TIMEOUT_S
            self._asked[request_id] = (self._thread.submit(self._count, blocks), deadline)

    def take(self, request_id: str) -> int | None:
        """Leading blocks that the store has; None while that is unknown.

        The answer is given once; afterwards, and for a prompt that was not asked for, it is 0.
        """
        asked = self._asked.get(request_id)
        if asked is None:
            return 0
        future, deadline = asked
        if not future.done() and time.monotonic() < deadline:
            return None
        del self._asked[request_id]
        if not future.done():
            future.cancel()
            self._rest("no answer in time")
            return 0
        return future.result()

    def forget(self, request_id: str) -> None:
        """Nobody will take the answer."""
        if asked := self._asked.pop(request_id, None):
            asked[0].cancel()

    def _count(self, blocks: Sequence[Sequence[str]]) -> int:
        try:
            # Most prompts share nothing: one name tells that.
            if not self._found(blocks[:1]):
                return 0
            return 1 + self._found(blocks[1:])
        except Exception as exc:  # noqa: BLE001 - in the scheduler it would end the engine
            self._rest(type(exc).__name__)
            return 0

    def _found(self, blocks: Sequence[Sequence[str]]) -> int:
        if not blocks:
            return 0
        ranks = len(blocks[0])
        there = self._store.touch([name for names in blocks for name in names])
        whole = [all(there[i : i + ranks]) for i in range(0, len(there), ranks)]
        return whole.index(False) if False in whole else len(whole)

    def _rest(self, why: str) -> None:
        self._resume_at = time.monotonic() + _REST_S
        logger.warning("shared prefixes are not looked for during %.0f s: %s", _REST_S, why)

    def close(self) -> None:
        """End the thread and close the connections."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._store.close()
