"""What does Prometheus hear of the kv servers? What was found lately (`StoreWatch`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pdtasks.messages import StoreFigures


class KVServers:
    """Figures of the servers, of which every worker tells the same."""

    def __init__(self, found: Callable[[], Sequence[StoreFigures]]) -> None:
        """`found()`: those that have answered lately."""
        self._found = found
        self._seen: set[int] = set()

    def collect(self) -> Iterable[Metric]:
        """For a registry of `prometheus_client`."""
        label = ["server"]
        up = GaugeMetricFamily(
            "pdtasks_kv_server_up", "1: it answers; 0: it did and does no more", labels=label
        )
        used = GaugeMetricFamily(
            "pdtasks_kv_server_memory_bytes", "Memory that it uses", labels=label
        )
        most = GaugeMetricFamily(
            "pdtasks_kv_server_memory_max_bytes",
            "Memory from which it evicts; 0: no limit",
            labels=label,
        )
        hits = CounterMetricFamily(
            "pdtasks_kv_server_hits", "Values that were asked for and there", labels=label
        )
        misses = CounterMetricFamily(
            "pdtasks_kv_server_misses", "Values that were asked for and not there", labels=label
        )
        evicted = CounterMetricFamily(
            "pdtasks_kv_server_evicted_blocks",
            "Values that it gave up for want of memory, before their TTL",
            labels=label,
        )
        found = self._found()
        # One that has never answered may be one that does not allow the question.
        self._seen |= {figures.server for figures in found}
        for server in sorted(self._seen):
            up.add_metric([str(server)], any(figures.server == server for figures in found))
        for figures in found:
            server_label = [str(figures.server)]
            used.add_metric(server_label, figures.used_bytes)
            most.add_metric(server_label, figures.max_bytes)
            hits.add_metric(server_label, figures.hits)
            misses.add_metric(server_label, figures.misses)
            evicted.add_metric(server_label, figures.evicted)
        yield from (up, used, most, hits, misses, evicted)
