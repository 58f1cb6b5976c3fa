"""What is told of an engine? Sums of what vLLM says with its steps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutputs
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.stats import PrefillStats, PrefixCacheStats, SchedulerStats

from pdtasks.engine.figures import EngineFigures
from pdtasks.kv.plan import TransferRecord, TransferStats
from tests.unit.factories import an_output


def registered() -> tuple[EngineFigures, CollectorRegistry]:
    figures, registry = EngineFigures(), CollectorRegistry()
    registry.register(figures)
    return figures, registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    found = registry.get_sample_value(f"pdtasks_engine_{name}", labels)
    assert found is not None, name
    return found


def test_tokens_are_summed_over_steps_and_prompts_by_where_their_kv_came_from() -> None:
    figures, registry = registered()
    first = an_output([1])
    first.prefill_stats = PrefillStats(10, 3, 7, 2, 5)
    first.events = [EngineCoreEvent(EngineCoreEventType.PREEMPTED, 1.0)]

    figures.take(EngineCoreOutputs(outputs=[first, an_output([2])]))
    figures.take(EngineCoreOutputs(outputs=[an_output([3, 4])]))

    assert value(registry, "steps_total") == 2
    assert value(registry, "output_tokens_total") == 4
    assert value(registry, "prompt_tokens_total", source="computed") == 3
    assert value(registry, "prompt_tokens_total", source="local_cache") == 2
    assert value(registry, "prompt_tokens_total", source="kv_store") == 5
    assert value(registry, "preemptions_total") == 1


def test_what_the_engine_is_at_is_what_it_said_last() -> None:
    figures, registry = registered()

    for running in (9, 3):
        stats = SchedulerStats(
            num_running_reqs=running,
            num_waiting_reqs=2,
            num_skipped_waiting_reqs=1,
            kv_cache_usage=0.25,
        )
        figures.take(EngineCoreOutputs(scheduler_stats=stats))

    assert value(registry, "running_requests") == 3
    assert value(registry, "waiting_requests", reason="capacity") == 2
    assert value(registry, "waiting_requests", reason="deferred") == 1
    assert value(registry, "kv_cache_usage_ratio") == figures.kv_usage == 0.25
    assert value(registry, "steps_total") == 0, "nothing was made"


def test_looks_into_the_caches_are_summed_for_the_sign_of_life_too() -> None:
    figures, registry = registered()
    stats = SchedulerStats(
        prefix_cache_stats=PrefixCacheStats(queries=100, hits=40),
        connector_prefix_cache_stats=PrefixCacheStats(
            queries=60, hits=50, hits_by_source={CacheHitSource.HOST: 50}
        ),
    )

    for _ in range(2):
        figures.take(EngineCoreOutputs(scheduler_stats=stats))
    figures.take(EngineCoreOutputs(scheduler_stats=SchedulerStats()))

    assert value(registry, "prefix_cache_queried_tokens_total") == 200
    assert value(registry, "prefix_cache_hit_tokens_total") == 80
    assert value(registry, "kv_store_queried_tokens_total") == 120
    assert value(registry, "kv_store_hit_tokens_total") == 100
    assert figures.totals.prefix_hits == 80
    assert figures.totals.kv_store_hits_by_source == {"host": 100}


def test_a_transfer_counts_its_bytes_and_what_became_of_its_blocks() -> None:
    def now(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"pdtasks_kv_{name}", labels) or 0.0

    def counts() -> tuple[float, ...]:
        return (
            now("bytes_total", op="load"),
            now("blocks_total", op="load", result="moved"),
            now("blocks_total", op="load", result="missing"),
            now("transfer_failures_total", op="load"),
            now("transfer_seconds_count", op="load"),
        )

    before = counts()
    record = TransferRecord(
        request_id="r",
        op="load",
        rank=0,
        world=1,
        blocks=3,
        bytes=300,
        missing=2,
        seconds=0.1,
        error="store: away",
    )
    EngineFigures.take_record(asdict(record))

    assert [b - a for a, b in zip(before, counts(), strict=True)] == [300, 3, 2, 1, 1]


def test_blocks_that_did_not_reach_the_store_are_counted_with_the_steps() -> None:
    def now() -> float:
        return REGISTRY.get_sample_value("pdtasks_kv_unsent_blocks_total") or 0.0

    before = now()
    figures, _ = registered()
    stats = TransferStats({"unsent": 3}).aggregate(TransferStats({"unsent": 2}))
    told: list[dict[str, Any]] = [stats.data, {"records": []}]
    for data in told:
        step = EngineCoreOutputs(scheduler_stats=SchedulerStats(kv_connector_stats=data))
        figures.take(step)

    assert now() - before == 5
