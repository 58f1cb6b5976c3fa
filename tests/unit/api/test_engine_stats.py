"""What does the pipeline look like as one engine?"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import SchedulerStats

from api.engine_stats import EngineStats, kv_blocks
from pdtasks.messages import EngineTotals, WorkerStatus
from tests.unit.api.core_bench import READY

PREFILL, DECODE = READY


def a_worker(of: WorkerStatus, **fields: Any) -> WorkerStatus:
    return msgspec.structs.replace(of, **fields)


def looked(
    *workers: WorkerStatus, open_: int = 0, begun: int = 0, in_line: int = 0
) -> SchedulerStats:
    return EngineStats().look(workers, open_=open_, begun=begun, in_line=in_line)


def test_each_request_runs_or_waits_once() -> None:
    # Of ten requests five have a token, two are in line, and of the three between them a prefill
    # engine has two.
    stats = looked(a_worker(PREFILL, active=2), DECODE, open_=10, begun=5, in_line=2)

    assert (stats.num_running_reqs, stats.num_waiting_reqs) == (7, 3)


def test_requests_of_other_api_processes_in_the_engines_are_not_taken_for_ours() -> None:
    stats = looked(a_worker(PREFILL, active=9), a_worker(DECODE, active=50), open_=3, begun=1)

    assert (stats.num_running_reqs, stats.num_waiting_reqs) == (3, 0)


def test_the_cache_is_as_full_as_the_fuller_stage() -> None:
    workers = [a_worker(PREFILL, kv_usage=0.1)]
    workers += [
        a_worker(DECODE, name=f"d{n}", kv_usage=usage) for n, usage in enumerate((0.4, 0.8))
    ]

    assert abs(looked(*workers).kv_cache_usage - 0.6) < 1e-9
    assert looked().kv_cache_usage == 0


def test_a_prompt_that_both_stages_look_up_is_counted_once() -> None:
    stats = EngineStats()
    none = EngineTotals()
    some = EngineTotals(
        prefix_queries=100,
        prefix_hits=40,
        kv_store_queries=60,
        kv_store_hits=30,
        kv_store_hits_by_source={"external_unspecified": 30},
    )

    def look(totals: EngineTotals) -> SchedulerStats:
        workers = [a_worker(PREFILL, totals=totals), a_worker(DECODE, totals=totals)]
        return stats.look(workers, open_=0, begun=0, in_line=0)

    look(none)
    told = look(some)
    again = look(some)

    assert (told.prefix_cache_stats.queries, told.prefix_cache_stats.hits) == (100, 40)
    assert told.connector_prefix_cache_stats is not None
    assert told.connector_prefix_cache_stats.hits_by_source == {
        CacheHitSource.EXTERNAL_UNSPECIFIED: 30
    }
    assert again.prefix_cache_stats.queries == 0, "told already"


def test_what_came_before_this_process_is_not_counted_and_what_a_new_worker_did_is() -> None:
    stats = EngineStats()
    old = a_worker(PREFILL, totals=EngineTotals(prefix_queries=1000))
    new = a_worker(PREFILL, name="new@h", pid=2, totals=EngineTotals(prefix_queries=7))

    first = stats.look([old], open_=0, begun=0, in_line=0)
    second = stats.look([old, new], open_=0, begun=0, in_line=0)
    # One that is started again under its name begins anew.
    third = stats.look(
        [old, a_worker(new, pid=3, totals=EngineTotals(prefix_queries=2))],
        open_=0,
        begun=0,
        in_line=0,
    )

    assert [s.prefix_cache_stats.queries for s in (first, second, third)] == [0, 7, 2]


def test_blocks_are_those_where_requests_live() -> None:
    workers = [
        a_worker(PREFILL, kv_blocks=5, kv_block_size=16),
        a_worker(DECODE, kv_blocks=10, kv_block_size=16),
        a_worker(DECODE, name="d2", kv_blocks=20, kv_block_size=16),
    ]

    assert kv_blocks(workers) == (30, 16)
    assert kv_blocks(READY) == (0, 0), "workers of an older release do not say"
