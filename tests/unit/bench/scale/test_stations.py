"""Do the simulation's queues behave as queueing theory says?"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import simpy

from pdtasks.bench.scale.stations import Station, later

NUMBER = 60_000


def mean_wait(rate: float, service: Callable[[], float], servers: int = 1) -> tuple[float, float]:
    """Mean wait for a server, and the utilisation, of Poisson arrivals."""
    env = simpy.Environment()
    station = Station(env, "a part", servers)
    rng = random.Random(1)
    waited = []

    def come() -> None:
        seconds = service()
        waited.append(station.visit(seconds) - env.now - seconds)
        if len(waited) < NUMBER:
            later(env, rng.expovariate(rate), come)

    later(env, 0, come)
    env.run()
    return sum(waited) / len(waited), station.utilisation(env.now)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_waits_for_one_server_that_always_takes_as_long_are_those_of_m_d_1(load: float) -> None:
    wait, utilisation = mean_wait(load, lambda: 1.0)

    assert wait == pytest.approx(load / (2 * (1 - load)), rel=0.05)
    assert utilisation == pytest.approx(load, rel=0.02)


def test_waits_for_one_server_of_exponential_times_are_those_of_m_m_1() -> None:
    rng = random.Random(2)

    wait, _ = mean_wait(0.6, lambda: rng.expovariate(1))

    assert wait == pytest.approx(0.6 / 0.4, rel=0.06)


def test_waits_for_three_servers_are_those_of_erlang_c() -> None:
    rng = random.Random(3)
    offered, servers = 2.1, 3
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - offered / servers)
    has_to_wait = last / (sum(terms) + last)

    wait, utilisation = mean_wait(offered, lambda: rng.expovariate(1), servers)

    assert wait == pytest.approx(has_to_wait / (servers - offered), rel=0.06)
    assert utilisation == pytest.approx(offered / servers, rel=0.02)


def test_visits_end_in_the_order_of_their_coming() -> None:
    env = simpy.Environment()
    station = Station(env, "a part")
    ended: list[tuple[float, str]] = []

    station.then(2.0, lambda: ended.append((env.now, "first")))
    station.then(1.0, lambda: ended.append((env.now, "second")), delay_s=0.5)
    env.run()

    assert ended == [(2.0, "first"), (3.5, "second")]
