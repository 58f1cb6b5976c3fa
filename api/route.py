"""Which way does a request take: through both stages, or to one worker that does all of it?

To hand a short prompt over takes longer than to compute it between other answers' tokens; and where
no prefill worker is, the way through both stages leads nowhere.  `api.line` decides, when it is a
request's turn; a caller may decide for it, to compare the two.
"""

from __future__ import annotations

from contextvars import ContextVar
from enum import StrEnum
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.guard import error_response

#: Says which way a request is to take: `split` or `whole`.
HEADER: Final = "X-Pdtasks-Route"


class Route(StrEnum):
    """The way, and why."""

    SPLIT = "split"  #: prefill, then decode
    # The others lead to a decode worker alone:
    SHORT_PROMPT = "short_prompt"
    NO_PREFILL = "no_prefill_worker"  #: none takes jobs that does not decode as well
    PREFILL_BUSY = "prefill_busy"  #: and the decode workers have nothing to do
    WISHED = "wished"  #: the caller said so

    @property
    def is_split(self) -> bool:
        """Do two workers share it?"""
        return self is Route.SPLIT


class Wish(StrEnum):
    """What a caller may say of it."""

    NONE = ""
    SPLIT = "split"
    WHOLE = "whole"


_wish: ContextVar[Wish] = ContextVar("route_wish", default=Wish.NONE)


def route_wish() -> Wish:
    """Of what is asked in this context."""
    return _wish.get()


class RouteWishes:
    """ASGI layer: takes the caller's wish from the header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        value = Headers(scope=scope).get(HEADER) if scope["type"] == "http" else None
        if value is None:
            await self._app(scope, receive, send)
            return
        try:
            wish = Wish(value)
        except ValueError:
            refusal = error_response(400, f"{HEADER} is `split` or `whole`", HEADER)
            await refusal(scope, receive, send)
            return
        token = _wish.set(wish)
        try:
            await self._app(scope, receive, send)
        finally:
            _wish.reset(token)
