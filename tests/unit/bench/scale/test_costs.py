"""Do live rows tell what a request, a token and a message cost?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdtasks.bench.scale.costs import Costs, faster, from_rows, least_squares


def row(answer: int, messages: float) -> dict[str, Any]:
    """As if the API cost 5 ms, 0.1 a token and 0.2 a message; the bus 1 ms and 0.05 a message."""
    return {
        "answer": answer,
        "answered": 10,
        "bus_messages": 10 * messages,
        "cpu_ms_per_request": {
            "api": 5 + 0.1 * answer + 0.2 * messages,
            "bus": 1 + 0.05 * messages,
            "broker": 3.0,
            "prefill": 2.0,
            "decode": 1 + 0.01 * answer + 0.03 * messages,
        },
    }


def test_costs_are_found_again_in_rows_that_were_made_of_them() -> None:
    rows = [row(250, 200), row(250, 50), row(10, 10), row(100, 30)]

    costs = from_rows(rows, Costs())

    assert costs.api_request_s == pytest.approx(0.005)
    assert costs.api_token_s == pytest.approx(100e-6)
    assert costs.api_message_s == pytest.approx(200e-6)
    assert costs.bus_request_s == pytest.approx(0.001)
    assert costs.bus_message_s == pytest.approx(50e-6)
    assert costs.broker_request_s == pytest.approx(0.003)
    assert costs.worker_request_s == pytest.approx(0.003)


def test_two_rows_tell_nothing_of_three_causes() -> None:
    with pytest.raises(ValueError, match="too few"):
        from_rows([row(250, 200), row(10, 10)], Costs())


def test_nothing_costs_less_than_nothing() -> None:
    counts = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])

    assert least_squares(counts, np.array([3.0, 2.0, 1.0]))[1] == 0.0
    assert least_squares(counts, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])


def test_faster_cores_take_less_of_what_is_computed_and_as_long_for_all_else() -> None:
    costs = Costs()
    twice = faster(costs, 2)

    assert twice.api_token_s == costs.api_token_s / 2
    assert twice.bus_message_s == costs.bus_message_s / 2
    assert twice.publish_s == costs.publish_s
    assert twice.kv_put_bytes_per_s == costs.kv_put_bytes_per_s
