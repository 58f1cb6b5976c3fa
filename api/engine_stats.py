"""What does the pipeline look like as one engine? For vLLM's metrics and its line in the log.

A request is in one stage at a time, so those that run may be summed over both.  Of prompts only
prefill's looks into the caches count: decode looks for the same tokens again when a request is
handed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

from pdtasks.messages import EngineTotals, WorkerStatus
from pdtasks.naming import DECODE, PREFILL, STAGES

_NOTHING: Final = EngineTotals()
_SOURCES: Final = {source.value: source for source in CacheHitSource}
#: Processes whose totals are remembered: more than live at once, with those that come back.
_MOST_KNOWN: Final = 1000

_Process = tuple[str, str, int, int]


class EngineStats:
    """Makes of what workers say of themselves what an engine would say. For one event loop."""

    def __init__(self) -> None:
        self._told: dict[_Process, EngineTotals] = {}
        self._is_first = True

    def look(
        self, workers: Sequence[WorkerStatus], *, open_: int, begun: int, in_line: int
    ) -> SchedulerStats:
        """What is to be told now; sums are those since the last look.

        Args:
            workers: of this model and vLLM.
            open_: this process's requests that have no end yet.
            begun: those among them that have a token.
            in_line: those that are not published yet.
        """
        ready = [w for w in workers if w.state == "ready"]
        # Whether a published one is in an engine or in the queue before it, its worker knows.
        in_engines = sum(w.active for w in ready if w.serves(PREFILL))
        running = begun + min(max(0, open_ - begun - in_line), in_engines)
        local, store = self._looks(workers)
        return SchedulerStats(
            num_running_reqs=running,
            num_waiting_reqs=open_ - running,
            kv_cache_usage=max((_usage(ready, stage) for stage in STAGES), default=0.0),
            prefix_cache_stats=local,
            connector_prefix_cache_stats=store,
        )

    def _looks(self, workers: Sequence[WorkerStatus]) -> tuple[PrefixCacheStats, PrefixCacheStats]:
        local, store = PrefixCacheStats(), PrefixCacheStats()
        for worker in workers:
            if not worker.serves(PREFILL):
                continue
            now = worker.totals
            # What was there before this process began is not counted, as in an engine of its own.
            before = self._told.pop(worker.process, now if self._is_first else _NOTHING)
            self._told[worker.process] = now
            local.queries += max(0, now.prefix_queries - before.prefix_queries)
            local.hits += max(0, now.prefix_hits - before.prefix_hits)
            store.queries += max(0, now.kv_store_queries - before.kv_store_queries)
            store.hits += max(0, now.kv_store_hits - before.kv_store_hits)
            for name, hits in now.kv_store_hits_by_source.items():
                more = hits - before.kv_store_hits_by_source.get(name, 0)
                source = _SOURCES.get(name, CacheHitSource.EXTERNAL_UNSPECIFIED)
                if more > 0:
                    store.hits_by_source[source] = store.hits_by_source.get(source, 0) + more
        self._is_first = False
        while len(self._told) > _MOST_KNOWN:
            del self._told[next(iter(self._told))]
        # vLLM takes what no request has asked for as nothing.
        local.requests, store.requests = int(local.queries > 0), int(store.queries > 0)
        return local, store


def kv_blocks(workers: Sequence[WorkerStatus]) -> tuple[int, int]:
    """Blocks of the decode engines, where requests live, and tokens in each; 0: not known yet."""
    decode = [w for w in workers if w.serves(DECODE) and w.kv_blocks]
    return sum(w.kv_blocks for w in decode), min((w.kv_block_size for w in decode), default=0)


def _usage(workers: Sequence[WorkerStatus], stage: str) -> float:
    """Mean share of KV blocks that requests hold in the engines of a stage."""
    shares = [w.kv_usage for w in workers if w.serves(stage)]
    return sum(shares) / len(shares) if shares else 0.0
