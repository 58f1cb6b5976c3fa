"""Who looks at the stack, and may he act on it?

With keys: an admin's key sees everything and may act, any other sees what it has asked itself.
Without keys everybody sees everything, as in the rest of the API, and whoever asks from this host
may act: not web pages of others that his browser shows.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

from pdtasks.keys import asker
from pdtasks.links import is_loopback_address
from pdtasks.overview import Viewer


def viewer_of(request: Request) -> Viewer:
    """Who has sent `request`."""
    key = asker.get()
    if key is not None:
        return Viewer(key=key.name, sees_all=key.admin, may_act=key.admin)
    if os.environ.get("VLLM_API_KEY"):
        # One secret for all, and not asked for on this route: so nobody is anybody.
        return Viewer()
    return Viewer(sees_all=True, may_act=_is_from_here(request))


def sees(viewer: Viewer, owner: str) -> bool:
    """May he know of a request of the key `owner`?"""
    return viewer.sees_all or (viewer.key != "" and viewer.key == owner)


def require_admin(request: Request) -> None:
    """Raises HTTPException."""
    if not viewer_of(request).may_act:
        raise HTTPException(
            403,
            "only an admin's key may do this, made by `pdtasks keys new NAME --admin`; without "
            "keys, whoever asks from the API's own host",
        )


def _is_from_here(request: Request) -> bool:
    """Behind a proxy of this host `client` is whom that names."""
    origin = request.headers.get("origin")
    if request.client is None or not is_loopback_address(request.client.host):
        return False
    try:
        return origin is None or is_loopback_address(urlsplit(origin).hostname or "")
    except ValueError:
        return False
