"""Does the burst count what was answered, and say what it found?"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from pdtasks.bench import burst, connections
from pdtasks.bench.burst import CHOICES, PARALLEL, Burst, format_burst, run_burst
from pdtasks.cli import main
from pdtasks.errors import BrokerUnavailable, NoWorker
from pdtasks.settings import Settings, load_settings

#: Of the last round: with two requests for many answers, and a plain one.
A_LAST = PARALLEL + 3
API_URL = "http://rabbit/api/"


class FakeStack(httpx.AsyncBaseTransport):
    """Answers as the API does; `refuse(body)` may give another answer."""

    def __init__(self, refuse: Callable[[dict[str, Any]], httpx.Response | None]) -> None:
        self._refuse = refuse
        self.asked: list[dict[str, Any]] = []
        self.at_once = 0
        self.most_at_once = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            return httpx.Response(200, json={"status": "ready"})
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        assert request.url.path == "/v1/completions"
        body = json.loads(request.content)
        self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        return self._refuse(body) or answer(body)


def answer(body: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"text": "x"}] * body.get("n", 1)})


def run(
    refuse: Callable[[dict[str, Any]], httpx.Response | None] = lambda body: None,
    *,
    rounds: int = 2,
    api_url: str | None = API_URL,
    count: Callable[[str], int] | None = None,
) -> tuple[Burst, list[str], FakeStack]:
    """What the burst found and said."""
    counts = iter([5, 12])
    stack, said = FakeStack(refuse), list[str]()
    found = run_burst(
        Settings(broker_api_url=api_url),
        rounds,
        said.append,
        transport=stack,
        count=count or (lambda url: next(counts)),
    )
    return found, said, stack


def test_each_round_is_many_requests_at_once_and_the_last_ends_with_many_answers_twice() -> None:
    found, said, stack = run()

    assert found.requests == found.answered == len(stack.asked) == PARALLEL + A_LAST
    assert stack.most_at_once == PARALLEL
    one_token, others = stack.asked[: 2 * PARALLEL], stack.asked[2 * PARALLEL :]
    assert {body["max_tokens"] for body in one_token} == {1}
    assert len({body["prompt"] for body in stack.asked if body["max_tokens"] == 1}) == 2 * PARALLEL
    assert [body.get("n", 1) for body in others] == [CHOICES, CHOICES, 1]
    assert {body["model"] for body in stack.asked} == {"tiny"}
    # A line for each round
    assert [line.partition(":")[0] for line in said] == ["round 1 of 2", "round 2 of 2"]
    assert f"{PARALLEL} of {PARALLEL} answered" in said[0]
    assert f"{A_LAST} of {A_LAST} answered" in said[1]


def test_connections_are_those_since_the_begin_by_rabbitmqs_count() -> None:
    assert run()[0].connections_opened == 12 - 5


def test_requests_that_are_refused_or_half_answered_are_counted() -> None:
    def refuse(body: dict[str, Any]) -> httpx.Response | None:
        if body["prompt"] == "Round 2, question 7:":
            return httpx.Response(503)
        if body["prompt"] == "Round 2, question 8:":
            raise httpx.ReadError("gone")
        if body["prompt"].startswith("Round 2: ") and body["n"] == CHOICES:
            return httpx.Response(200, json={"choices": [{"text": "x"}]})
        return None

    found, said, _ = run(refuse)

    assert (found.requests, found.answered) == (PARALLEL + A_LAST, PARALLEL + A_LAST - 4)
    assert f"{PARALLEL} of {PARALLEL} answered" in said[0]
    assert f"{A_LAST - 4} of {A_LAST} answered" in said[1]
    assert said[1].endswith("; 1 × HTTP 503; 1 × ReadError; 2 × answers missing")


def test_a_request_is_not_waited_for_without_end_and_no_other_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(burst, "ANSWER_S", 1.0)
    monkeypatch.setattr(burst, "PARALLEL", 3)

    class Silent(FakeStack):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if b"Round 1, question 2" in request.content:
                await asyncio.Event().wait()
            return await super().handle_async_request(request)

    said: list[str] = []
    silent = Silent(lambda body: None)
    found = run_burst(Settings(), 2, said.append, transport=silent)

    assert (found.requests, found.answered) == (3, 2)
    assert found.slowest_s >= 1
    assert said[-1].endswith("; 1 × no answer within 1 s")


def test_without_a_management_api_connections_are_not_counted_and_it_says_so() -> None:
    found, said, _ = run(api_url=None)

    assert found.connections_opened is None
    assert "no management API of RabbitMQ is known" in said[0]


def test_a_management_api_that_does_not_answer_is_no_reason_to_stop() -> None:
    def count(url: str) -> int:
        raise BrokerUnavailable("it is away")

    found, said, _ = run(count=count)

    assert found.answered == PARALLEL + A_LAST
    assert found.connections_opened is None
    assert said[0] == "connections are not counted: it is away"


def test_the_table_has_a_column_for_each_figure() -> None:
    assert format_burst(Burst(303, 302, 4.321, 7)).splitlines() == [
        "requests  answered  slowest, s  connections opened",
        "     303       302        4.32                   7",
    ]
    assert format_burst(Burst(303, 302, 4.321, None)).splitlines()[1].endswith(" -")


# -- before it begins ----------------------------------------------------------------------------


def refusal(handler: Callable[[httpx.Request], httpx.Response]) -> str:
    with pytest.raises(NoWorker) as refused:
        run_burst(Settings(), 1, lambda line: None, transport=httpx.MockTransport(handler))
    return str(refused.value)


def test_where_nothing_runs_it_says_what_to_do() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    assert "no API answers at http://127.0.0.1:8000 (ConnectError): start a stack" in refusal(away)


def test_a_stack_that_is_not_ready_is_named_with_the_reason() -> None:
    said = refusal(lambda request: httpx.Response(503, json={"detail": "no decode worker"}))

    assert "is not ready (no decode worker): wait until `pdtasks status` shows" in said


def test_another_program_on_that_port_is_named() -> None:
    said = refusal(lambda request: httpx.Response(200, text="hello"))

    assert "is no API of pdtasks" in said


# -- the command ---------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    request_queue_size = 2 * PARALLEL
    refused = ""  #: a request with this prompt gets no answer


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/api/overview":
            self._send(200, {"churn_rates": {"connection_created": 3}})
        else:
            self._send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = 503 if body["prompt"] == self.server.refused else 200
        self._send(status, {"choices": [{"text": "x"}] * body.get("n", 1)})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        wire = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(wire)))
        self.end_headers()
        self.wfile.write(wire)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[_Server]:
    """The API and RabbitMQ's management API in one."""
    with _Server(("127.0.0.1", 0), _Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        port = made.server_address[1]
        monkeypatch.setenv("PDTASKS_HOME", str(tmp_path))
        monkeypatch.setenv("PDTASKS_API_PORT", str(port))
        monkeypatch.setenv("PDTASKS_BROKER_API_URL", f"http://127.0.0.1:{port}/api/")
        monkeypatch.setattr(connections, "_STEADY_S", 0.0)
        load_settings.cache_clear()
        yield made
        made.shutdown()
        thread.join()
    load_settings.cache_clear()


def test_the_command_prints_and_writes_the_figures(server: _Server, tmp_path: Path) -> None:
    file = tmp_path / "burst.json"

    done = CliRunner().invoke(main, ["bench", "burst", "--rounds", "1", "--json", str(file)])

    assert done.exit_code == 0, done.output
    assert "round 1 of 1" in done.output
    assert "connections opened" in done.output
    figures = json.loads(file.read_text())
    assert list(figures) == ["requests", "answered", "slowest_s", "connections_opened"]
    assert figures["requests"] == figures["answered"] == A_LAST
    assert figures["slowest_s"] > 0
    assert figures["connections_opened"] == 0


def test_the_command_fails_when_a_request_was_not_answered(server: _Server, tmp_path: Path) -> None:
    server.refused = "Round 1, question 7:"
    file = tmp_path / "burst.json"

    done = CliRunner().invoke(main, ["bench", "burst", "--rounds", "1", "--json", str(file)])

    assert done.exit_code == 1
    assert "1 × HTTP 503" in done.output
    assert json.loads(file.read_text())["answered"] == A_LAST - 1


def test_the_command_without_a_stack_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PDTASKS_HOME", str(tmp_path))
    monkeypatch.setenv("PDTASKS_API_PORT", "1")
    load_settings.cache_clear()

    done = CliRunner().invoke(main, ["bench", "burst"])

    load_settings.cache_clear()
    assert done.exit_code == 1
    assert done.output.startswith("pdtasks: no API answers at http://127.0.0.1:1")
    assert "pdtasks up" in done.output
