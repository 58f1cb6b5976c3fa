"""Is RabbitMQ's count of connections read when it has caught up?"""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from pdtasks.bench.connections import count_connections
from pdtasks.errors import BrokerUnavailable

URL = "http://pdtasks:secret@rabbit:15672/api/"


class Clock:
    """Time passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def count(answer: Callable[[float], httpx.Response]) -> tuple[int, float]:
    """The count, and how long it took, with an API that gives `answer(seconds since begin)`."""
    clock = Clock()
    found = count_connections(
        URL,
        transport=httpx.MockTransport(lambda request: answer(clock())),
        clock=clock,
        sleep=clock.sleep,
    )
    return found, clock()


def overview(number: int | None) -> httpx.Response:
    rates = {} if number is None else {"connection_created": number}
    return httpx.Response(200, json={"churn_rates": rates})


def test_a_count_that_stands_still_for_an_update_holds() -> None:
    assert count(lambda now: overview(7)) == (7, 6.5)


def test_what_comes_with_the_next_update_counts() -> None:
    found, took_s = count(lambda now: overview(None if now < 1 else 7 if now < 4.9 else 9))

    assert found == 9
    assert took_s < 12


def test_somebody_who_connects_all_the_time_is_not_waited_for() -> None:
    assert count(lambda now: overview(int(now))) == (30, 30.0)


def test_it_asks_for_the_overview_with_name_and_password() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/api/overview"
        assert request.headers["Authorization"].startswith("Basic ")
        return overview(1)

    clock = Clock()
    transport = httpx.MockTransport(answer)
    assert count_connections(URL, transport=transport, clock=clock, sleep=clock.sleep) == 1


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(401),
        httpx.Response(200, text="hello"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={}),
    ],
)
def test_an_api_without_a_count_is_an_error_without_the_password(answer: httpx.Response) -> None:
    with pytest.raises(BrokerUnavailable) as failed:
        count(lambda now: answer)

    assert "management API" in str(failed.value)
    assert "secret" not in str(failed.value)
