"""A program: what `vllm serve` runs in front of its engine, with the stub where its core is.

vLLM's own server, app, handlers and `AsyncLLM`.  The core is another process there, which sends
what it makes over a socket; here, as in our worker, the stub is in the same process.
"""

from __future__ import annotations

import sys
from typing import Any

import uvloop
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.v1.engine.core_client import EngineCoreClient

from api.flags import front_end_arguments
from pdtasks.bench.stream.stub import StreamCore
from pdtasks.engine.arguments import engine_arguments
from pdtasks.engine.models import resolve_model
from pdtasks.settings import load_settings


def _stub(**_: Any) -> StreamCore:
    return StreamCore()


def main(port: int) -> None:
    """Serve on loopback until SIGTERM."""
    settings = load_settings()
    model = resolve_model(settings.model, settings.cache_dir, print)
    arguments = front_end_arguments(settings.api_args, model)
    for name, value in engine_arguments(settings, model).items():
        setattr(arguments, name, value)
    arguments.served_model_name = [settings.model_name]
    arguments.host, arguments.port = "127.0.0.1", port
    # As our API: a line for each request is not what is measured.
    arguments.disable_uvicorn_access_log = True
    EngineCoreClient.make_async_mp_client = staticmethod(_stub)  # type: ignore[method-assign]
    uvloop.run(run_server(arguments))


if __name__ == "__main__":
    main(int(sys.argv[1]))
