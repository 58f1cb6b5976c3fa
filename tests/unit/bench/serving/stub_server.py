"""A stand-in for an OpenAI-compatible server: as many tokens as asked for, at once, no engine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class StubServer:
    """Answers completions; remembers what it was asked."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    short_by: int = 0  #: tokens that are missing in the end
    token_s: float = 0.0  #: between tokens
    first_s: float = 0.0  #: before the first
    together: int = 1  #: tokens of a chunk
    url: str = ""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/pdtasks/requests/{name}", self._report)
        return app

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if self.status != 200:
            return web.json_response({"error": "no"}, status=self.status)
        count = body["max_tokens"] - self.short_by
        if not body.get("stream"):
            choice = {"token_ids": list(range(count)), "text": "x" * count}
            choice["logprobs"] = {"token_logprobs": [-0.5] * count}
            found: dict[str, Any] = {"choices": [choice]}
            if "kv_transfer_params" in body:
                found["kv_transfer_params"] = {"remote_host": self.url}
            return web.json_response(found)
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await out.prepare(request)
        await asyncio.sleep(self.first_s)
        for start in range(0, count, self.together):
            ids = list(range(start, min(count, start + self.together)))
            await self._send(out, {"choices": [{"text": "", "token_ids": ids}]})
            await asyncio.sleep(self.token_s)
        await self._send(out, {"choices": [], "usage": {"completion_tokens": count}})
        await out.write(b"data: [DONE]\n\n")
        return out

    async def _send(self, out: web.StreamResponse, chunk: dict[str, Any]) -> None:
        # As vLLM writes JSON: without blanks.
        await out.write(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode())

    async def _report(self, request: web.Request) -> web.Response:
        times = {"queue_s": 0.001, "seconds": 0.01, "kv_seconds": 0.002}
        blocks = {"kv_blocks_loaded": 11, "kv_blocks_recomputed": 1}
        stages = {"prefill": times | {"kv_blocks_recomputed": 0}, "decode": times | blocks}
        return web.json_response({"sequences": [stages]})


@contextmanager
def running(app: web.Application) -> Iterator[str]:
    """Serve `app` in a thread in between; its URL."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)

    async def start() -> str:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    url = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield url
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
