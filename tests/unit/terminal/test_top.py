"""What does `pdtasks top` show?"""

from __future__ import annotations

import io
import json

import httpx
import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from pdtasks.cli import main
from pdtasks.overview import Overview
from pdtasks.terminal.top import render
from tests.unit.terminal.views import a_view, a_worker, an_overview


def text_of(found: Overview, width: int = 120, height: int = 50) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False)
    console.print(render(found, console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_other_api_processes_are_told_of() -> None:
    other = msgspec.structs.replace(an_overview().api, pid=7)
    assert "with 1 more" in text_of(an_overview(others=(other,)))
    assert "more" not in text_of(an_overview()).splitlines()[0]


def test_everything_is_there() -> None:
    text = text_of(an_overview())

    for word in (
        *("prefill1@h", "decode1@h", "ready", "2 h 0 min", "25%"),
        *("1 in line", "2 prefill", "3 hand-over", "4 decode"),
        *("123 ms", "500 ms", "1.5 s", "17", "1.2 s"),
        *("chatcmpl-1", "done", "900", "41", "250 ms", "75% of 4 blocks"),
    ):
        assert word in text


def test_a_worker_that_is_ill_says_why() -> None:
    ill = a_worker(state="stalled", reason="the main loop stands")

    assert "stalled: the main loop stands" in text_of(an_overview(workers=(ill,)))
    assert "no worker shows a sign of life" in text_of(an_overview(workers=()))


def test_what_could_not_be_asked_is_said() -> None:
    found = an_overview(problems=("RabbitMQ does not tell its queues: TimeoutError",))

    assert "! RabbitMQ does not tell" in text_of(found)


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 24), (120, 40), (200, 60)])
def test_it_fits_the_terminal(width: int, height: int) -> None:
    many = an_overview(requests=tuple(a_view(f"chatcmpl-{'x' * 40}{i}") for i in range(50)))
    lines = text_of(many, width, height).splitlines()

    assert max(map(len, lines)) <= width
    if height > 24:
        assert len(lines) <= height


class Server:
    """What answers in the place of an API."""

    def __init__(self, answer: httpx.Response | Exception) -> None:
        self.answer = answer
        self.keys: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.keys.append(request.headers.get("authorization", ""))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def run(monkeypatch: pytest.MonkeyPatch, server: Server, *arguments: str) -> tuple[int, str]:
    own = httpx.Client

    def client(**options: object) -> httpx.Client:
        options["transport"] = httpx.MockTransport(server)
        return own(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(httpx, "Client", client)
    done = CliRunner().invoke(main, ["top", "--url", "http://api.test", *arguments])
    return done.exit_code, done.output


def test_once_is_plain_text_with_exit_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(httpx.Response(200, content=msgspec.json.encode(an_overview())))
    code, output = run(monkeypatch, server, "--once")

    assert code == 0
    assert "decode1@h" in output
    assert "\x1b" not in output
    assert server.keys == [""]


def test_json_is_what_the_api_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDTASKS_API_KEY", "pdt-secret")
    server = Server(httpx.Response(200, content=msgspec.json.encode(an_overview())))
    code, output = run(monkeypatch, server, "--json")

    assert code == 0
    assert msgspec.convert(json.loads(output), Overview) == an_overview()
    assert server.keys == ["Bearer pdt-secret"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.ConnectError("refused"), "no API answers at http://api.test"),
        (httpx.Response(401), "asks for a key: set PDTASKS_API_KEY"),
        (httpx.Response(404, json={"error": {"message": "no such page"}}), "404: no such page"),
        (httpx.Response(200, text="<html>"), "no API of this release of pdtasks"),
        (httpx.Response(200, json={"at": 1}), "no API of this release of pdtasks"),
    ],
)
def test_an_api_that_does_not_answer_is_one_sentence(
    answer: httpx.Response | Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = run(monkeypatch, Server(answer), "--once")

    assert code == 1
    assert says in output
    assert len(output.splitlines()) == 1
