"""Does the burst bench count what was answered? Against a stub of the API."""

from __future__ import annotations

import json

import httpx
import pytest

from pdtasks.bench.burst import Burst, NotReady, format_burst, run_burst


class StubApi(httpx.AsyncBaseTransport):
    """Answers every request but those whose prompt begins with `refused`."""

    def __init__(self, refused: str = "nothing", ready: int = 200) -> None:
        self.bodies: list[dict[str, object]] = []
        self._refused = refused
        self._ready = ready

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            return httpx.Response(self._ready, json={"detail": "no decode worker is alive"})
        body = json.loads(await request.aread())
        self.bodies.append(body)
        if body["prompt"].startswith(self._refused):
            return httpx.Response(503, json={"error": "no worker"})
        return httpx.Response(200, json={"choices": [{}] * body["n"]})


def run(api: StubApi, lines: list[str], rounds: int = 2) -> Burst:
    return run_burst(
        "http://stub", "m", None, lines.append, rounds=rounds, parallel=10, choices=4, transport=api
    )


def test_each_round_each_choice_and_the_plain_request_count() -> None:
    api, lines = StubApi(), list[str]()

    burst = run(api, lines)

    assert (burst.requests, burst.answered) == (2 * 10 + 2 + 1, 23)
    assert burst.slowest_s > 0
    assert [body["n"] for body in api.bodies].count(4) == 2
    assert len({body["prompt"] for body in api.bodies}) == 23
    assert lines[0] == "round 1 of 2: 10 requests of one token: 10 answered in 0.0 s"


def test_what_was_not_answered_is_counted_and_said() -> None:
    api, lines = StubApi(refused="1,"), list[str]()

    burst = run(api, lines)

    assert (burst.requests, burst.answered) == (23, 13)
    assert "0 answered" in lines[0]
    assert '10 not (HTTP 503: {"error":"no worker"})' in lines[0].replace(': "', ':"')


def test_the_figures_have_the_names_that_are_promised() -> None:
    burst = Burst(requests=3, answered=2, slowest_s=0.5, connections_opened=None)

    assert burst.to_json() == {
        "requests": 3,
        "answered": 2,
        "slowest_s": 0.5,
        "connections_opened": None,
    }
    assert "connections opened  unknown (set PDTASKS_BROKER_API_URL)" in format_burst(burst)


def test_a_stack_that_is_not_ready_is_not_measured() -> None:
    with pytest.raises(NotReady, match="no decode worker is alive"):
        run(StubApi(ready=503), [])


def test_where_no_stack_runs_it_is_said_how_to_start_one() -> None:
    with pytest.raises(NotReady, match="pdtasks up"):
        run_burst("http://127.0.0.1:9", "m", None, lambda line: None)
