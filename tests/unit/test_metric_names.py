"""Has `promtool` anything against our metrics? Of all that code makes, without a service."""

from __future__ import annotations

from importlib import import_module

from msgspec.structs import replace
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from vllm.config import CacheConfig

from api.metrics import Figures
from pdtasks.broker.depths import Depth
from pdtasks.engine.figures import EngineFigures
from pdtasks.messages import StoreFigures
from pdtasks.naming import PREFILL
from pdtasks.worker import counting
from pdtasks.worker.counting import Look, WorkerFigures
from pdtasks.worker.kv_servers import KVServers
from tests.scraping import complaints, families
from tests.unit.api.core_bench import Bench, with_bench
from tests.unit.api.test_metrics import ON_BUS, StubQueues
from tests.unit.test_observability_manual import in_code

#: All modules that count as they go.
COUNTING = (
    *("api.access", "api.admission", "api.core", "api.line", "api.usage"),
    *("pdtasks.background", "pdtasks.broker.aborting", "pdtasks.broker.publishing"),
    *("pdtasks.worker.announcing", "pdtasks.worker.discarding", "pdtasks.worker.events"),
)


def everything(bench: Bench) -> str:
    """What a worker and an API process tell together."""
    registry = CollectorRegistry()
    figures_of_kv = StoreFigures(used_bytes=7, max_bytes=9, hits=1, misses=2, evicted=3, server=0)
    found = [figures_of_kv, replace(figures_of_kv, server=1)]
    servers = KVServers(lambda: found)
    assert list(servers.collect())
    found.pop()  # it answers no more
    figures = Figures({"m": (bench.core, CacheConfig())}, None, StubQueues())
    figures._on_bus, figures._in_queues = ON_BUS, {"prefill": Depth(7, 2)}
    look = Look(state="ready", slots=8, stages=1, overdue=0, unsent_replies=0)
    for collector in (EngineFigures(), WorkerFigures(lambda: look), servers, figures):
        registry.register(collector)
    counting.ended(PREFILL, "done", None, "")
    return generate_latest(registry).decode() + generate_latest(REGISTRY).decode()


def test_promtool_has_nothing_against_any_of_our_metrics() -> None:
    for module in COUNTING:
        import_module(module)

    async def test(bench: Bench) -> None:
        text = everything(bench)
        assert complaints(text) == []
        assert sorted({name for name, _ in in_code()} - families(text)) == []
        assert 'pdtasks_kv_server_up{server="0"} 1.0' in text
        assert 'pdtasks_kv_server_up{server="1"} 0.0' in text

    with_bench(test)
