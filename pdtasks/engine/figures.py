"""What has one engine done so far, and how full is it? For Prometheus, and for the sign of life.

vLLM says it with each step's outputs.  Numbers are added up here, once for each step; what they are
called is looked up when somebody asks.  The names are ours, not vLLM's: the API has vLLM's own for
the pipeline as a whole, and a dashboard that found both would count each request twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from prometheus_client import Counter as Counted
from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from pdtasks.messages import EngineTotals

#: Seconds; a hand-over within a host takes some milliseconds, one that waits for Valkey seconds.
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)

_KV_BYTES = Counted("pdtasks_kv_bytes", "Bytes of KV that this engine's ranks moved", ["op"])
_KV_BLOCKS = Counted(
    "pdtasks_kv_blocks", "KV blocks that were to be moved, by what became of them", ["op", "result"]
)
_KV_SECONDS = Histogram(
    "pdtasks_kv_transfer_seconds",
    "From the step that asked for a transfer until it was done",
    ["op"],
    buckets=_SECONDS,
)
_KV_UNSENT = Counted(
    "pdtasks_kv_unsent_blocks", "KV blocks that left the ring without reaching the store"
)
_KV_FAILURES = Counted("pdtasks_kv_transfer_failures", "Transfers that ended with an error", ["op"])


class EngineFigures:
    """Sums since the engine's start. Written on the engine's loop, read by any thread."""

    def __init__(self) -> None:
        self.kv_usage = 0.0  #: share of the KV cache's blocks that requests hold, as vLLM counts
        self.totals = EngineTotals()
        self._running = self._waiting = self._deferred = 0
        self._steps = self._preemptions = self._generated = 0
        self._prompt_tokens: Counter[str] = Counter()  # by where their KV came from

    def take(self, outputs: EngineCoreOutputs) -> None:
        """Add what one message of the engine core says."""
        if made := outputs.outputs:
            self._steps += 1
            self._generated += sum([len(output.new_token_ids) for output in made])
        for output in made:
            if output.prefill_stats is not None or output.events:  # once for a request, mostly
                self._take_begun(output)
        if outputs.scheduler_stats is not None:
            self._take_stats(outputs.scheduler_stats)

    def _take_begun(self, output: EngineCoreOutput) -> None:
        if (prefill := output.prefill_stats) is not None:
            self._prompt_tokens["computed"] += prefill.num_computed_tokens
            self._prompt_tokens["local_cache"] += prefill.num_local_cached_tokens
            self._prompt_tokens["kv_store"] += prefill.num_external_cached_tokens
        for event in output.events or ():
            self._preemptions += event.type == EngineCoreEventType.PREEMPTED

    def _take_stats(self, stats: SchedulerStats) -> None:
        self.kv_usage = stats.kv_cache_usage
        self._running = stats.num_running_reqs
        self._waiting = stats.num_waiting_reqs
        self._deferred = stats.num_skipped_waiting_reqs
        if stats.kv_connector_stats:
            _KV_UNSENT.inc(stats.kv_connector_stats.get("unsent", 0))
        local, store = stats.prefix_cache_stats, stats.connector_prefix_cache_stats
        if local.queries or (store is not None and store.queries):
            before = self.totals
            sources = Counter(before.kv_store_hits_by_source)
            if store is not None:
                sources.update({str(s.value): n for s, n in store.hits_by_source.items()})
            self.totals = EngineTotals(
                prefix_queries=before.prefix_queries + local.queries,
                prefix_hits=before.prefix_hits + local.hits,
                kv_store_queries=before.kv_store_queries + (store.queries if store else 0),
                kv_store_hits=before.kv_store_hits + (store.hits if store else 0),
                kv_store_hits_by_source=dict(sources),
            )

    @staticmethod
    def take_record(record: Mapping[str, Any]) -> None:
        """Add what one rank says of a transfer: the fields of a `pdtasks.kv.plan.TransferRecord`.

        A load's `moved` blocks are the store's or ring's hits, the `missing` ones its misses.
        """
        op = record["op"]
        _KV_BYTES.labels(op).inc(record["bytes"])
        _KV_BLOCKS.labels(op, "moved").inc(record["blocks"])
        if missing := record["missing"]:
            _KV_BLOCKS.labels(op, "missing").inc(missing)
        if record["error"]:
            _KV_FAILURES.labels(op).inc()
        _KV_SECONDS.labels(op).observe(record["seconds"])

    def collect(self) -> Iterable[Metric]:
        """For a registry of `prometheus_client`."""
        totals = self.totals
        yield CounterMetricFamily(
            "pdtasks_engine_steps", "Steps that made tokens", value=self._steps
        )
        yield CounterMetricFamily(
            "pdtasks_engine_output_tokens", "Tokens that this engine made", value=self._generated
        )
        prompt = CounterMetricFamily(
            "pdtasks_engine_prompt_tokens",
            "Prompt tokens of requests that began here, by where their KV came from",
            labels=["source"],
        )
        for source in ("computed", "local_cache", "kv_store"):
            prompt.add_metric([source], self._prompt_tokens[source])
        yield prompt
        yield CounterMetricFamily(
            "pdtasks_engine_preemptions",
            "Times that a request lost its KV to others and began again",
            value=self._preemptions,
        )
        yield GaugeMetricFamily(
            "pdtasks_engine_running_requests", "Requests in the last step", value=self._running
        )
        waiting = GaugeMetricFamily(
            "pdtasks_engine_waiting_requests",
            "Requests that wait for a step, for room (capacity) or for their KV (deferred)",
            labels=["reason"],
        )
        waiting.add_metric(["capacity"], self._waiting)
        waiting.add_metric(["deferred"], self._deferred)
        yield waiting
        yield GaugeMetricFamily(
            "pdtasks_engine_kv_cache_usage_ratio",
            "Share of the engine's KV blocks that requests hold, 0 to 1",
            value=self.kv_usage,
        )
        yield CounterMetricFamily(
            "pdtasks_engine_prefix_cache_queried_tokens",
            "Prompt tokens looked up in the prefix cache",
            value=totals.prefix_queries,
        )
        yield CounterMetricFamily(
            "pdtasks_engine_prefix_cache_hit_tokens",
            "Prompt tokens found in the prefix cache",
            value=totals.prefix_hits,
        )
        yield CounterMetricFamily(
            "pdtasks_engine_kv_store_queried_tokens",
            "Prompt tokens asked of the KV store or a ring",
            value=totals.kv_store_queries,
        )
        yield CounterMetricFamily(
            "pdtasks_engine_kv_store_hit_tokens",
            "Prompt tokens that the KV store or a ring is said to have",
            value=totals.kv_store_hits,
        )
