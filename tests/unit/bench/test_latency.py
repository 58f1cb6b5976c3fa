"""Medians and the slowest of a hundred."""

from __future__ import annotations

from pdtasks.bench.latency import p50_p99_ms


def test_the_slowest_of_a_hundred_is_one_that_was_measured() -> None:
    assert p50_p99_ms([0.25]) == (250.0, 250.0)
    assert p50_p99_ms([n / 1000 for n in reversed(range(200))]) == (99.5, 198.0)
