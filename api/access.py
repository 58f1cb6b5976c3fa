"""Who is let in? The layer before everything else of ours: no key, no work.

What is open to anybody says nothing of anybody: whether the API lives, and its metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.dashboard import OPEN_PATHS
from api.guard import error_response, response_of
from api.usage import limit_hit
from pdtasks.errors import PdtasksError, TooManyRequests
from pdtasks.keys import Key, Keys, asker

#: For load balancers and Prometheus, and the page, which is empty without a key.
_OPEN: Final = frozenset({"/health", "/ping", "/ready", "/metrics"}) | OPEN_PATHS


class Access:
    """ASGI layer: asks for a key, and keeps each to its limits."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, begin: Callable[[Key], Awaitable[None]]
    ) -> None:
        """`begin` is awaited before each request; what it raises refuses it."""
        self._app = app
        self._keys = keys
        self._begin = begin
        self._at_once: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket") or scope["path"] in _OPEN or not self._keys:
            await self._app(scope, receive, send)
            return
        if scope.get("method") == "OPTIONS":  # a browser asks without a key whether it may ask
            await self._app(scope, receive, send)
            return
        key = self._keys.find(_secret(scope))
        if key is None:
            response = error_response(
                401, "a valid API key is needed: send `Authorization: Bearer KEY`"
            )
            response.headers["WWW-Authenticate"] = "Bearer"
            await _answer(response, scope, receive, send)
            return
        if key.at_once is not None and self._at_once[key.name] >= key.at_once:
            limit_hit(key, "at_once")
            refusal = TooManyRequests(
                f"this API key may have {key.at_once} requests at once", retry_after_s=1
            )
            await _answer(response_of(refusal), scope, receive, send)
            return
        token = asker.set(key)
        self._at_once[key.name] += 1
        try:
            if scope.get("method") == "POST":
                await self._begin(key)
        except PdtasksError as exc:
            await _answer(response_of(exc), scope, receive, send)
        else:
            await self._app(scope, receive, send)
        finally:
            self._at_once[key.name] -= 1
            asker.reset(token)


async def _answer(response: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await response(scope, receive, send)


def _secret(scope: Scope) -> str:
    headers = Headers(scope=scope)
    scheme, _, secret = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip()
    return headers.get("x-api-key", "")  # as Anthropic's clients send it
