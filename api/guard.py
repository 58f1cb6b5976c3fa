"""What does no route have to think of? Bodies that are too large or no text, parameters that nobody
would heed, and surprises.

The outermost layer of ours: what is refused here costs no parsing, no rendering and no worker.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdtasks.errors import PdtasksError, where

logger = logging.getLogger(__name__)

#: Where the body lies in a request's state, for whoever explains an error.
BODY = "pdtasks_body"
#: Seconds for a whole body.
_BODY_S = 60.0
#: The same for one that its route reads piece by piece, and for each of its pieces.
_STREAMED_S = 1800.0
_PIECE_S = 60.0

# Half of a surrogate pair: JSON can spell it, no text can hold it.
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    """OpenAI's error object."""
    kind = HTTPStatus(status).phrase
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status)


def retry_after(error: Exception) -> dict[str, str]:
    """The header that tells when to come again, if `error` knows."""
    seconds = getattr(error, "retry_after_s", None)
    return {} if seconds is None else {"Retry-After": str(seconds)}


def response_of(error: PdtasksError) -> JSONResponse:
    """An error of ours as callers see it."""
    response = error_response(error.http_status, str(error))
    response.headers.update(retry_after(error))
    return response


class BodyIsLate(Exception):
    """A body that its route reads piece by piece does not come."""


class Guard:
    """Stands before all routes of an app."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        before: Callable[[], Awaitable[None]],
        streamed: Collection[str] = (),
        refuse: Callable[[str, Mapping[bytes, bytes], bytes], tuple[str, str] | None] | None = None,
    ) -> None:
        """Args:
        max_body_bytes: larger ones are a 413.
        before: awaited before each request with a body goes on.
        streamed: paths whose routes read bodies piece by piece, and bound them.
        refuse: which parameter of a path, headers and a body is refused, and why.
        """
        self._app = app
        self._streamed = streamed
        self._max_body_bytes = max_body_bytes
        self._before = before
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST" and scope["path"] in self._streamed:
            receive = _in_time(receive)
        elif scope["method"] in ("POST", "PUT", "PATCH"):
            try:
                async with asyncio.timeout(_BODY_S):
                    body = await self._read(scope, receive)
            except TimeoutError:
                late = error_response(408, f"the body has not come within {_BODY_S:g} s")
                await late(scope, receive, send)
                return
            refused = self._refusal(scope, body)
            if refused is not None:
                await refused(scope, receive, send)
                return
            assert body is not None
            scope.setdefault("state", {})[BODY] = body
            receive = _again(body, receive)
            await self._before()
        await self._surely_answered(scope, receive, send)

    async def _surely_answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette would answer what nobody handles as well, and log its text: a prompt, maybe."""
        begun = False

        def noted(message: Message) -> Awaitable[None]:  # (no coroutine more for each token)
            nonlocal begun
            begun = True
            return send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller gets an answer
            logger.error("%s %s failed: %s", scope["method"], scope["path"], where(exc))  # noqa: TRY400
            if begun:
                # The connection has to break, for whoever reads must not take this for the end.
                raise ConnectionError("the response was cut: see the log") from None
            failed = error_response(500, f"an unforeseen {type(exc).__name__}: see the API's log")
            await failed(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when it is too large, or its sender has gone."""
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told) > self._max_body_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    def _refusal(self, scope: Scope, body: bytes | None) -> JSONResponse | None:
        if body is None:
            return error_response(
                413,
                f"the body has more than {self._max_body_bytes} bytes: send less, or have "
                f"PDTASKS_MAX_BODY_BYTES raised",
            )
        broken = broken_text(body)
        if broken is not None:
            return error_response(
                400, f"{broken or 'body'}: half of a surrogate pair is no text", broken or None
            )
        if self._refuse is not None:
            refusal = self._refuse(scope["path"], dict(scope["headers"]), body)
            if refusal is not None:
                param, message = refusal
                return error_response(400, message, param)
        return None


def _in_time(receive: Receive) -> Receive:
    """Raises BodyIsLate when it is; once it is whole one may wait for a hang-up."""
    until = time.monotonic() + _STREAMED_S
    is_whole = False

    async def received() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()
        try:
            async with asyncio.timeout(min(_PIECE_S, until - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise BodyIsLate from None
        is_whole = not message.get("more_body", False)
        return message

    return received


def _again(body: bytes, receive: Receive) -> Receive:
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return parts.pop() if parts else await receive()

    return replay


def broken_text(body: bytes) -> str | None:
    """The path of a string in `body` that is no text; None: all are, or it is no JSON."""
    if not _MAYBE_SURROGATE.search(body):
        return None
    try:
        return _broken_in(json.loads(body))
    except (ValueError, RecursionError):
        return None


def _broken_in(value: Any) -> str | None:
    """The path of a string in `value` that is no text; None: all are."""
    if isinstance(value, str):
        return "" if _SURROGATE.search(value) else None
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
        if any(_SURROGATE.search(name) for name in value):
            return ""
    elif isinstance(value, list):
        items = enumerate(value)
    for name, item in items:
        inner = _broken_in(item)
        if inner is not None:
            return f"{name}.{inner}" if inner else str(name)
    return None
