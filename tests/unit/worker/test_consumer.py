"""How does a worker's main loop come back to RabbitMQ?"""

from __future__ import annotations

import logging
from typing import Any

import kombu
import kombu.utils.functional
import pytest

from pdtasks.cluster.probes import free_ports
from pdtasks.worker.consumer import StageConsumer


class Enough(Exception):
    """The test has seen enough tries."""


def test_a_worker_looks_for_rabbitmq_every_few_seconds_however_long_it_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) > 60:
            raise Enough

    monkeypatch.setattr(kombu.utils.functional, "sleep", sleep)
    (port,) = free_ports(1)
    nobody = kombu.Connection(f"amqp://user:secret@127.0.0.1:{port}//")
    consumer: Any = object.__new__(StageConsumer)

    with caplog.at_level(logging.ERROR), pytest.raises(Enough):
        consumer.ensure_connected(nobody)

    tries = [r.getMessage() for r in caplog.records if "cannot be reached" in r.getMessage()]
    assert len(tries) >= 20  # in a minute
    assert "next try in 0.5 s" in tries[0]
    assert "next try in 3.0 s" in tries[-1]
    assert "secret" not in caplog.text
