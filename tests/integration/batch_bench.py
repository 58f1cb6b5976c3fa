"""An API process in the test, as far as files and batches go, with stubs of what is vLLM's."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError

from api import batches, errors, files
from api.access import Access
from api.client import PipelineHTTPError
from api.main import _running_jobs
from api.parameters import Parameters
from pdtasks.background import Background
from pdtasks.cluster.rights import User
from pdtasks.errors import PdtasksError
from pdtasks.keys import Keys
from pdtasks.settings import Settings
from tests.integration.conftest import Services

MODEL = "m"
CHAT = "/v1/chat/completions"


class Answer:
    """As vLLM's models are dumped."""

    error = None

    def __init__(self, text: str) -> None:
        self._text = text

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {"object": "chat.completion", "choices": [{"message": {"content": self._text}}]}


class Handler:
    """vLLM's handler of chats: says what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.most_at_once = 0
        self.at_once = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.raises: list[PdtasksError] = []

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        text = request.messages[-1]["content"]
        self.asked[text] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.may_answer.wait()
            await asyncio.sleep(0)
        finally:
            self.at_once -= 1
        if self.raises:
            raise PipelineHTTPError(self.raises.pop())
        if text == "bad":
            raise VLLMValidationError("that cannot be", parameter="messages")
        if text == "odd":
            raise KeyError("odd")
        return Answer(text)

    def create_error_response(self, exc: Exception) -> Any:
        return create_error_response(exc)


def own_settings(services: Services) -> Settings:
    """On an empty bus."""
    services.bus.flushall()
    return Settings(
        bus_url=services.bus_server.url_for(User.API),
        served_model_name=MODEL,
        max_file_bytes=64 << 20,
        max_body_bytes=8192,
    )


@asynccontextmanager
async def an_api(
    settings: Settings, handler: Handler, keys: str = ""
) -> AsyncIterator[httpx.AsyncClient]:
    """An API process: its routes and its runners, without vLLM's."""
    app = FastAPI()
    for router in (files.router, batches.router):
        app.include_router(router)
    app.state.openai_serving_chat = handler
    errors.install(app)

    async def nothing(_: Any) -> None:
        pass

    app.add_middleware(cast("Any", Access), keys=Keys(None, keys), begin=nothing)
    transport = httpx.ASGITransport(app)
    async with (
        _running_jobs(app, settings, Background(), Parameters(priorities=False)),
        httpx.AsyncClient(transport=transport, base_url="http://api", timeout=30) as client,
    ):
        yield client


def run(test: Coroutine[Any, Any, None], within_s: float = 30) -> None:
    async def main() -> None:
        async with asyncio.timeout(within_s):
            await test

    asyncio.run(main())


def a_line(custom_id: str, text: str = "hello", **changes: Any) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    line = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes
    return json.dumps(line)


def some_lines(count: int) -> list[str]:
    return [a_line(f"id-{number}", f"text {number}") for number in range(count)]


async def upload(client: httpx.AsyncClient, content: Any, **headers: str) -> dict[str, Any]:
    if isinstance(content, list):
        content = "\n".join(content).encode()
    response = await client.post(
        "/v1/files",
        data={"purpose": "batch"},
        files={"file": ("in.jsonl", content)},
        headers=headers,
    )
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def begin(client: httpx.AsyncClient, content: Any, **headers: str) -> dict[str, Any]:
    file = await upload(client, content, **headers)
    order = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    response = await client.post("/v1/batches", json=order, headers=headers)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert found["status"] == "validating"
    return found


async def look(client: httpx.AsyncClient, batch: dict[str, Any], **headers: str) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
    return found


async def becomes(
    client: httpx.AsyncClient, batch: dict[str, Any], status: str, **headers: str
) -> dict[str, Any]:
    while (found := await look(client, batch, **headers))["status"] != status:
        assert found["status"] in ("validating", "in_progress", "finalizing", "cancelling"), found
        await asyncio.sleep(0.02)
    return found


async def lines_of(client: httpx.AsyncClient, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    response = await client.get(f"/v1/files/{file_id}/content")
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


async def outcomes(
    client: httpx.AsyncClient, batch: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of the output file, and of the error file."""
    return (
        await lines_of(client, batch["output_file_id"]),
        await lines_of(client, batch["error_file_id"]),
    )
