"""What does a bench say of a stack that does not answer as it should?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from pdtasks.bench import asking
from pdtasks.bench.asking import ask_stack
from pdtasks.errors import InvalidRequest, NoWorker
from pdtasks.settings import load_settings


@contextmanager
def a_server(answers: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    """One that answers so, by path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Not on the screen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


async def ask(client: httpx.AsyncClient, model: str) -> str:
    (await client.get("/asked")).raise_for_status()
    return model


MODELS = {"/v1/models": (200, b'{"data": [{"id": "tiny"}]}')}


@pytest.mark.parametrize(
    ("body", "told"),
    [(b'{"error": {"message": "too long"}}', "too long"), (b"no JSON", "no JSON")],
)
def test_a_refusal_is_told_in_the_stacks_own_words(
    body: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_server(MODELS | {"/asked": (400, body)}) as url:
        monkeypatch.setattr(asking, "api_url", lambda _: url)
        with pytest.raises(InvalidRequest, match=f"answers 400: {told}"):
            ask_stack(load_settings(), ask)


def test_a_stack_without_workers_has_no_model_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_server({"/v1/models": (200, b'{"object": "list", "data": []}')}) as url:
        monkeypatch.setattr(asking, "api_url", lambda _: url)
        with pytest.raises(NoWorker, match=r"no model of the stack at .* has workers"):
            ask_stack(load_settings(), ask)


def test_what_is_no_stack_of_pdtasks_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_server({"/v1/models": (200, b"[]")}) as url:
        monkeypatch.setattr(asking, "api_url", lambda _: url)
        with pytest.raises(NoWorker, match="no stack of pdtasks answers"):
            ask_stack(load_settings(), ask)
