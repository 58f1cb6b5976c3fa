"""vLLM's metrics of several models in one process."""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter

from api.engine_metrics import EngineMetrics

NAME = "vllm:test_of_several"


def a_set(model: str) -> Counter:
    """What vLLM makes for one model, after it has taken away what was there."""
    return Counter(NAME, "Of one model", ["model_name"])


def told(model: str) -> float | None:
    return REGISTRY.get_sample_value(f"{NAME}_total", {"model_name": model})


def test_each_model_goes_on_counting_for_itself_and_all_are_told_as_one_family() -> None:
    with EngineMetrics() as metrics:
        one = a_set("one")
        metrics.take()
        other = a_set("other")
        metrics.take()

        one.labels("one").inc(3)
        other.labels("other").inc(4)

        assert (told("one"), told("other")) == (3, 4)
        assert [family.name for family in metrics.collect()].count(NAME) == 1
    assert told("one") is None
