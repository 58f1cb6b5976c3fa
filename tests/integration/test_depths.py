"""RabbitMQ tells the API's user how long queues are, and nothing hangs where it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import kombu
import pytest

from pdtasks.broker import depths as depths_module
from pdtasks.broker.depths import Depth, Depths
from pdtasks.cluster.rights import User
from pdtasks.errors import BrokerUnavailable
from tests.integration.conftest import Services

QUEUE = "depths-of-a-test"


@pytest.fixture(autouse=True)
def _always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depths_module, "_FRESH_S", 0.0)


@contextmanager
def a_queue(services: Services) -> Iterator[kombu.Connection]:
    with kombu.Connection(services.rabbit.operator_url) as connection:
        queue = kombu.Queue(QUEUE)(connection.default_channel)
        queue.queue_declare()
        yield connection
        queue.delete()


def asked(*queues: str) -> Any:
    async def ask() -> Any:
        depths = Depths(queues)
        try:
            return await depths.read()
        finally:
            depths.close()

    return asyncio.run(ask())


def connect_to(url: str, our_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_app, "connection_for_write", partial(kombu.Connection, url))


def test_the_apis_user_is_told_lengths_and_consumers(
    services: Services, our_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_to(services.rabbit.url_for(User.API), our_app, monkeypatch)
    with a_queue(services) as connection:
        producer = kombu.Producer(connection.default_channel)
        for _ in range(3):
            producer.publish("x", routing_key=QUEUE)

        found = asked(QUEUE, "there-is-none", QUEUE)

    assert found == {QUEUE: Depth(ready=3, consumers=0)}


def test_a_connection_that_broke_meanwhile_is_made_again(services: Services, our_app: Any) -> None:
    async def test() -> None:
        depths = Depths([QUEUE])
        try:
            assert await depths.read() == {QUEUE: Depth(0, 0)}
            depths._connection.connection.transport.close()
            assert await depths.read() == {QUEUE: Depth(0, 0)}
        finally:
            depths.close()

    with a_queue(services):
        asyncio.run(test())


def test_a_broker_that_is_away_is_told_in_time(
    our_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_to("amqp://guest:guest@127.0.0.1:1//", our_app, monkeypatch)

    with pytest.raises(BrokerUnavailable, match="RabbitMQ does not tell its queues"):
        asked(QUEUE)
