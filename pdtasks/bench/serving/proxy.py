"""What stands in front of several vLLM servers: `python -m pdtasks.bench.serving.proxy PORT URL…`

Without --prefill requests go to the servers in turn. With it, a prefill server computes the prompt
and says where its KV is, and a decode server, given that, answers: vLLM's own protocol for its
NixlConnector (`kv_transfer_params`, docs/features/disagg_prefill.md of vLLM).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import click
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

_PATHS: Final = ("/v1/completions", "/v1/chat/completions")
_MOST_BYTES: Final = 1 << 28
#: What a prefill server is asked for: one token, and its KV kept for somebody else.
_COMPUTE: Final[dict[str, Any]] = {
    "max_tokens": 1,
    "stream": False,
    "kv_transfer_params": {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    },
}
#: What would contradict that.
_NOT_FOR_PREFILL: Final = ("stream_options", "min_tokens", "max_completion_tokens")

_SESSION = web.AppKey("session", ClientSession)


class Proxy:
    """Forwards requests. For one event loop."""

    def __init__(self, servers: list[str], prefill: list[str]) -> None:
        """`servers` answer; `prefill`, if any, compute the prompts first. Base URLs."""
        self._servers: Iterator[str] = itertools.cycle(servers)
        self._prefill: Iterator[str] | None = itertools.cycle(prefill) if prefill else None

    def app(self) -> web.Application:
        """The HTTP server."""
        app = web.Application(client_max_size=_MOST_BYTES)
        app.cleanup_ctx.append(_session)
        app.router.add_get("/health", _health)
        for path in _PATHS:
            app.router.add_post(path, self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        session, body = request.app[_SESSION], await request.json()
        try:
            if self._prefill is not None:
                ask = {k: v for k, v in body.items() if k not in _NOT_FOR_PREFILL} | _COMPUTE
                async with session.post(next(self._prefill) + request.path, json=ask) as answer:
                    computed = await answer.json()
                if not (where := computed.get("kv_transfer_params")):
                    return web.json_response(computed, status=502)
                body["kv_transfer_params"] = where
            return await _relay(session, next(self._servers) + request.path, body, request)
        except ClientError as exc:
            return web.json_response({"error": {"message": str(exc), "code": 502}}, status=502)


async def _relay(
    session: ClientSession, url: str, body: dict[str, Any], request: web.Request
) -> web.StreamResponse:
    async with session.post(url, json=body) as answer:
        kind = answer.headers.get("Content-Type", "application/json")
        out = web.StreamResponse(status=answer.status, headers={"Content-Type": kind})
        await out.prepare(request)
        async for chunk in answer.content.iter_any():
            await out.write(chunk)
        await out.write_eof()
        return out


async def _session(app: web.Application) -> AsyncIterator[None]:
    async with ClientSession(timeout=ClientTimeout(None), connector=TCPConnector(limit=0)) as own:
        app[_SESSION] = own
        yield


async def _health(_request: web.Request) -> web.Response:
    return web.Response()


@click.command()
@click.argument("port", type=int)
@click.argument("servers", nargs=-1, required=True)
@click.option("--prefill", multiple=True)
def main(port: int, servers: tuple[str, ...], prefill: tuple[str, ...]) -> None:
    """Listen on loopback until SIGTERM."""
    app = Proxy(list(servers), list(prefill)).app()
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    sys.exit(main())
