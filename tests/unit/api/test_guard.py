"""What stands before all routes: sizes, text, and an answer whatever is raised behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.middleware import Middleware

from api import errors, guard
from api.guard import Guard


@pytest.fixture
def looked() -> list[int]:
    """One item for each look at what a request needs."""
    return []


@pytest.fixture
def client(looked: list[int]) -> TestClient:
    """Of an app whose routes echo, or raise with a prompt in the text."""

    async def look() -> None:
        looked.append(1)

    app = FastAPI(middleware=[Middleware(Guard, max_body_bytes=100, before=look)])

    @app.post("/echo")
    async def echo(request: Request) -> Any:
        return await request.json()

    @app.api_route("/raise", methods=["GET", "POST"])
    async def surprise() -> None:
        raise RuntimeError("canary")

    @app.get("/cut")
    async def cut() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "one"
            raise RuntimeError("canary")

        return StreamingResponse(pieces())

    return TestClient(app, raise_server_exceptions=False)


def test_a_body_goes_on_as_it_came(client: TestClient, looked: list[int]) -> None:
    body = {"text": 'ä "\\ud83d\\ude42"', "list": [1, {"a": None}]}

    assert client.post("/echo", json=body).json() == body
    assert looked == [1]


@pytest.mark.parametrize("content", [b"x" * 101, iter([b"x" * 60, b"x" * 60])])
def test_a_body_beyond_the_limit_is_refused_before_anything(
    client: TestClient, looked: list[int], content: Any
) -> None:
    response = client.post("/echo", content=content)

    assert response.status_code == 413
    assert looked == []


def test_a_body_that_does_not_come_is_not_waited_for(
    client: TestClient, looked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_BODY_S", 0.05)
    sent: list[Any] = []

    async def trickle() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/echo", "headers": []}
    asyncio.run(Guard(client.app, max_body_bytes=100, before=lambda: None)(scope, trickle, send))  # type: ignore[arg-type,return-value]  # never called

    assert sent[0]["status"] == 408
    assert looked == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"a": {"b": ["x", "\ud800"]}}, "a.b.1"),
        ({"\ud800": 1}, None),
        (["\udfff"], "0"),
        ("\udc00x", None),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_by_its_path(
    client: TestClient, body: Any, param: str | None
) -> None:
    response = client.post("/echo", content=json.dumps(body))

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_surprise_is_answered_and_its_text_is_nowhere(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    for response in (client.get("/raise"), client.post("/raise", content="{}")):
        assert response.status_code == 500
        assert "RuntimeError" in response.json()["error"]["message"]
        assert "canary" not in response.text
    assert "GET /raise failed: RuntimeError at" in caplog.text


def test_a_stream_that_breaks_does_not_look_like_one_that_ends(client: TestClient) -> None:
    with pytest.raises(ConnectionError):
        TestClient(client.app).get("/cut")


def test_ours_and_the_frameworks_errors_have_one_shape(client: TestClient) -> None:
    app = client.app
    assert isinstance(app, FastAPI)
    errors.install(app)

    for response, status in ((client.get("/nowhere"), 404), (client.get("/echo"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["code"] == status
    assert client.get("/echo").headers["Allow"] == "POST"


def test_a_body_that_its_route_reads_comes_piece_by_piece_and_has_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "_PIECE_S", 0.2)
    seen: list[int] = []
    late: list[bool] = []

    async def route(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (message := await receive())["more_body"]:
                seen.append(len(message["body"]))
        except guard.BodyIsLate:
            late.append(True)

    async def look() -> None:
        seen.append(0)

    guarded = Guard(route, max_body_bytes=100, before=look, streamed=("/files",))
    pieces = [{"type": "http.request", "body": b"x" * 90, "more_body": True} for _ in range(5)]

    async def receive() -> Any:
        return pieces.pop() if pieces else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        raise AssertionError

    async def test() -> None:
        scope: Any = {"type": "http", "method": "POST", "path": "/files", "headers": []}
        async with asyncio.timeout(10):
            await guarded(scope, receive, send)

    asyncio.run(test())
    assert seen == [90] * 5, "more than one body may have, as they came"
    assert late == [True]
