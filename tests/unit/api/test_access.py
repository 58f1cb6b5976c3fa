"""Who is let in, and how often?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, generate_latest
from starlette.middleware import Middleware

from api.access import Access
from api.usage import limit_hit
from pdtasks.errors import TooManyRequests
from pdtasks.keys import Key, Keys, asker_name

SECRETS = {"alice": "a-secret", "bob": "b-secret"}


class StubKeys(Keys):
    """Keys with limits, without a file."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(None, ",".join(SECRETS.values()))
        self._fixed = [
            Key(name, key.digest, **limits) for name, key in zip(SECRETS, self._fixed, strict=True)
        ]


@pytest.fixture
def counted() -> list[str]:
    """Whose requests were counted."""
    return []


def client(keys: Keys, counted: list[str]) -> TestClient:
    async def count(key: Key) -> None:
        counted.append(key.name)
        if len(counted) > 3:
            raise TooManyRequests("enough for this minute", retry_after_s=7)

    app = FastAPI(middleware=[Middleware(Access, keys=keys, begin=count)])

    @app.api_route("/v1/echo", methods=["GET", "POST"])
    @app.get("/metrics")
    @app.get("/ready")
    @app.get("/docs/x")
    async def echo() -> str:
        return asker_name() or "nobody"

    return TestClient(app)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_without_keys_nobody_is_asked(counted: list[str]) -> None:
    assert client(Keys(None), counted).post("/v1/echo").json() == "nobody"
    assert counted == []


@pytest.mark.parametrize("path", ["/v1/echo", "/docs/x", "/nowhere", "/openapi.json"])
@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), bearer(""), {"Authorization": "a-secret"}, {"x-api-key": "wrong"}],
)
def test_without_a_valid_key_nothing_is_told(
    path: str, headers: dict[str, str], counted: list[str]
) -> None:
    answer = client(StubKeys(), counted).get(path, headers=headers)

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == 401
    assert "secret" not in answer.text
    assert counted == []


@pytest.mark.parametrize("path", ["/ready", "/metrics"])
def test_balancers_and_prometheus_need_no_key(path: str, counted: list[str]) -> None:
    assert client(StubKeys(), counted).get(path).status_code == 200


@pytest.mark.parametrize("headers", [bearer("b-secret"), {"x-api-key": "b-secret"}])
def test_who_has_a_key_is_known_by_its_name(headers: dict[str, str], counted: list[str]) -> None:
    answer = client(StubKeys(), counted).post("/v1/echo", headers=headers)

    assert answer.json() == "bob"
    assert counted == ["bob"]


def test_reading_counts_for_nothing(counted: list[str]) -> None:
    assert client(StubKeys(), counted).get("/v1/echo", headers=bearer("a-secret")).json() == "alice"
    assert counted == []


def test_who_has_had_his_share_is_told_when_to_come_again(counted: list[str]) -> None:
    asking = client(StubKeys(at_once=1), counted)
    answers = [asking.post("/v1/echo", headers=bearer("a-secret")) for _ in range(5)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["Retry-After"] == "7"
    # and one who was refused is none at once
    assert answers[-1].json()["error"]["message"] == "enough for this minute"


def test_a_key_has_so_many_requests_at_once() -> None:
    async def main() -> None:
        may_end = asyncio.Event()

        async def route(scope: Any, receive: Any, send: Any) -> None:
            await may_end.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def begin(_key: Key) -> None:
            """Nothing to count."""

        access = Access(route, keys=StubKeys(at_once=2), begin=begin)

        async def ask(secret: str) -> int:
            told: list[Any] = []

            async def send(message: Any) -> None:
                told.append(message)

            headers = [(b"authorization", f"Bearer {secret}".encode())]
            scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": headers}
            await access(scope, _nothing, send)
            return int(told[0]["status"])

        first = [asyncio.create_task(ask("a-secret")) for _ in range(2)]
        await asyncio.sleep(0)
        assert await ask("a-secret") == 429
        others = asyncio.create_task(ask("b-secret"))
        await asyncio.sleep(0)
        may_end.set()
        assert await asyncio.gather(*first, others) == [200, 200, 200]
        assert await ask("a-secret") == 200

    asyncio.run(main())


def test_a_websocket_needs_a_key_too() -> None:
    async def main() -> list[Any]:
        told: list[Any] = []

        async def route(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("let in")

        async def begin(_key: Key) -> None:
            """Nothing to count."""

        async def send(message: Any) -> None:
            told.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
        await Access(route, keys=StubKeys(), begin=begin)(scope, _nothing, send)
        return told

    assert asyncio.run(main()) == [{"type": "websocket.close", "code": 1008}]


async def _nothing() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


def test_a_limit_that_is_hit_is_counted_under_the_digest_and_never_under_the_name() -> None:
    key = Key("alice", bytes(range(32)), at_once=1)
    labels = {"key": "000102030405", "limit": "at_once"}

    def hits() -> float:
        return REGISTRY.get_sample_value("pdtasks_limits_hit_total", labels) or 0.0

    before = hits()
    limit_hit(key, "at_once")

    assert hits() - before == 1
    assert "alice" not in generate_latest(REGISTRY).decode()
