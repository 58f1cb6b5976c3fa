"""How do `pdtasks top` and `pdtasks chat` reach the API of a running stack?

Its URL comes from the settings, which know the stack of this host, or from `--url`.  A key comes
from the environment alone: everybody on a host can read a command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import httpx
import msgspec

from pdtasks.cluster.children import api_url
from pdtasks.errors import ConfigurationError, PdtasksError
from pdtasks.keys import KEY_VARIABLE
from pdtasks.overview import Overview, RequestReport
from pdtasks.settings import load_settings

_T = TypeVar("_T")

_ANSWER_S: Final = 10.0
_CONNECT_S: Final = 3.0


class NoAnswer(PdtasksError):
    """No API of pdtasks answers, or it refuses."""


class Client:
    """One API process. For one thread."""

    def __init__(
        self, url: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        """`url`: None: of the stack that runs on this host."""
        self.url = url or api_url(load_settings())
        key = os.environ.get(KEY_VARIABLE, "")
        try:
            self.http = httpx.Client(
                base_url=self.url,
                timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                trust_env=False,  # no proxy
                transport=transport,
            )
        except (httpx.InvalidURL, ValueError) as exc:
            raise ConfigurationError(f"{self.url!r} is no URL of an API") from exc

    def close(self) -> None:
        """Hang up."""
        self.http.close()

    def overview(self, limit: int, **of: str) -> Overview:
        """What goes on; `model`: with this one alone. Raises NoAnswer."""
        return self._get(Overview, "/pdtasks/overview", limit=limit, **of)

    def report(self, request_id: str) -> RequestReport | None:
        """What the stages did for a request; None: this process does not know it."""
        try:
            return self._get(RequestReport, f"/pdtasks/requests/{request_id}")
        except NoAnswer:
            return None

    def model(self) -> str:
        """The name of what is served. Raises NoAnswer."""
        with self.explained():
            response = self.http.get("/v1/models")
            self.check(response)
            alive = response.json()["data"]
        if not alive:
            raise NoAnswer(f"no model of the API at {self.url} has workers")
        return str(alive[0]["id"])

    def _get(self, kind: type[_T], path: str, **params: Any) -> _T:
        with self.explained():
            response = self.http.get(path, params=params)
            self.check(response)
            return msgspec.json.decode(response.content, type=kind)

    def check(self, response: httpx.Response) -> None:
        """Raises NoAnswer for a refusal; its body must have been read."""
        if response.status_code == 401:
            raise NoAnswer(
                f"the API at {self.url} asks for a key: set {KEY_VARIABLE} to one "
                "(`pdtasks keys new NAME`)"
            )
        if response.is_error:
            raise NoAnswer(f"the API answers {response.status_code}: {_message(response)}")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raises NoAnswer in place of what a library raises."""
        try:
            yield
        except (httpx.ReadTimeout, httpx.WriteTimeout) as exc:
            raise NoAnswer(f"the API at {self.url} has not answered in time") from exc
        except (httpx.ReadError, httpx.RemoteProtocolError) as exc:
            raise NoAnswer(f"the API at {self.url} has hung up: see its log") from exc
        except httpx.TransportError as exc:
            raise NoAnswer(
                f"no API answers at {self.url} ({type(exc).__name__}): start a stack with "
                "`pdtasks up`, or name another with --url or PDTASKS_HOME"
            ) from exc
        except (msgspec.MsgspecError, ValueError, LookupError, TypeError) as exc:
            raise NoAnswer(
                f"what answers at {self.url} is no API of this release of pdtasks "
                f"({type(exc).__name__})"
            ) from exc


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:200]
