"""How much of a prompt does the store have already?

The scheduler may not wait for the network.  It starts a probe when a request arrives and asks for
the answer each time it considers the request; until there is one, other requests go first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vllm.logger import init_logger

from pdtasks.kv.store import BlockStore

logger = init_logger(__name__)

#: Seconds that a request waits for the answer; longer than that the store is no help.
PROBE_TIMEOUT_S = 0.25
#: Seconds without probes after one that failed: a store that is away delays few requests.
_REST_S = 5.0
#: Blocks that one round trip asks for.
_AT_ONCE = 256


@dataclass(eq=False)
class _Question:
    """What is known of one prompt's beginning."""

    blocks: Sequence[Sequence[str]]
    deadline: float
    found: int = 0  #: leading blocks that the store has, so far
    begun: bool = False
    done: bool = False
    wanted: bool = True


class PrefixProbe:
    """Asks a store for prefixes, in a thread of its own."""

    def __init__(self, store: BlockStore) -> None:
        """Args:
        store: its `timeout_s` should be `PROBE_TIMEOUT_S`.
        """
        self._store = store
        self._thread = ThreadPoolExecutor(1, "kv-probe")
        self._asked: dict[str, _Question] = {}
        self._resume_at = 0.0

    @property
    def num_open(self) -> int:
        """Questions whose answer nobody has taken yet."""
        return len(self._asked)

    def start(self, request_id: str, blocks: Sequence[Sequence[str]]) -> None:
        """Look for the leading `blocks` of a prompt, each given by its names (one for each rank).

        Those found get a new TTL.
        """
        if blocks and time.monotonic() >= self._resume_at:
            question = _Question(blocks, time.monotonic() + PROBE_TIMEOUT_S)
            self._asked[request_id] = question
            self._thread.submit(self._answer, question)

    def take(self, request_id: str) -> int | None:
        """Leading blocks that the store has; None while that is unknown.

        When time is up it is what has been found until then.  The answer is given once;
        afterwards, and for a prompt that was not asked for, it is 0.
        """
        question = self._asked.get(request_id)
        if question is None:
            return 0
        if not question.done and time.monotonic() < question.deadline:
            return None
        self.forget(request_id)
        if question.begun and not question.done and not question.found:
            self._rest("no answer in time")
        return question.found

    def forget(self, request_id: str) -> None:
        """Nobody will take the answer."""
        if question := self._asked.pop(request_id, None):
            question.wanted = False

    def _answer(self, question: _Question) -> None:
        question.begun = True
        try:
            # Most prompts share nothing: one name tells that.
            size, blocks = 1, question.blocks
            while question.wanted and question.found < len(blocks):
                some = blocks[question.found : question.found + size]
                there = self._count(some)
                question.found += there
                if there < len(some):
                    break
                size = _AT_ONCE
        except Exception as exc:  # noqa: BLE001 - no answer is an answer
            self._rest(type(exc).__name__)
        question.done = True

    def _count(self, blocks: Sequence[Sequence[str]]) -> int:
        ranks = len(blocks[0])
        there = self._store.touch([name for names in blocks for name in names])
        whole = [all(there[i : i + ranks]) for i in range(0, len(there), ranks)]
        return whole.index(False) if False in whole else len(whole)

    def _rest(self, why: str) -> None:
        self._resume_at = time.monotonic() + _REST_S
        logger.warning("shared prefixes are not looked for during %.0f s: %s", _REST_S, why)

    def close(self) -> None:
        """End the thread and close the connections; waits for one round trip at most."""
        for question in self._asked.values():
            question.wanted = False  # a long prompt behind a slow store takes many
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._store.close()
