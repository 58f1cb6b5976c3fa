"""How do vLLM's metrics of several models come into one scrape?

vLLM has one set of them in a process: who makes another takes the earlier ones out of the registry.
Each goes on counting, with its model's name, and is told here.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from prometheus_client import REGISTRY
from prometheus_client.core import Metric

_PREFIX = "vllm:"


class EngineMetrics:
    """A collector for `prometheus_client`, while it is entered."""

    def __init__(self) -> None:
        self._collectors: list[Any] = []

    def __enter__(self) -> Self:
        REGISTRY.register(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        REGISTRY.unregister(self)

    def take(self) -> None:
        """Tell what vLLM has in the registry now, in its place. Before a further model is made."""
        for collector in list(REGISTRY._collector_to_names):  # noqa: SLF001 - as vLLM does
            if getattr(collector, "_name", "").startswith(_PREFIX):
                REGISTRY.unregister(collector)
                self._collectors.append(collector)

    def describe(self) -> Iterable[Metric]:
        """Nothing is looked at before somebody asks."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All of it; one family for each name, with the samples of all models."""
        families: dict[str, Metric] = {}
        for collector in self._collectors:
            for family in collector.collect():
                if (known := families.get(family.name)) is not None:
                    known.samples += family.samples
                else:
                    families[family.name] = family
        return families.values()
