"""Which files are the page `/dashboard`? Plain HTML, CSS and modules from this package alone.

They say nothing of anybody and are open to whoever reaches the API: the page asks for a key itself
where one is needed (`api.overview`).  The policy has a browser load nothing from elsewhere, and
talk to nobody but this API.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response

PATH: Final = "/dashboard"
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked for again after an upgrade.
    "Cache-Control": "no-cache",
}
_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_INDEX: Final = "index.html"

router = APIRouter(prefix=PATH, include_in_schema=False)


def _read() -> dict[str, bytes]:
    folder = files("api").joinpath("page")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


_FILES: Final = _read()
#: For whom nobody is asked.
OPEN_PATHS: Final = frozenset({PATH, *(f"{PATH}/{name}" for name in _FILES if name != _INDEX)})


@router.get("")
async def page() -> Response:
    """The page itself."""
    return _answer(_INDEX)


@router.get("/{name}")
async def part(name: str) -> Response:
    """A file that the page loads."""
    if name not in _FILES or name == _INDEX:
        raise HTTPException(404, f"the page has no {name!r}")
    return _answer(name)


def _answer(name: str) -> Response:
    kind = _TYPES[name.rpartition(".")[2]]
    return Response(_FILES[name], media_type=kind, headers=_HEADERS)
