"""The reference: vLLM's own OpenAI app over one ordinary engine, no connector. Run as a program.

Reads from standard input `{"flags": {name: "…"}, "reasoning": {name: parser}, "requests": [[name,
path, body], …]}`, sends the requests one after the other, each to the app with the flags of that
name, and writes the answers, `[[status, text], …]`, to the file named on the command line.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from pdtasks.engine.arguments import engine_arguments
from pdtasks.engine.models import resolve_model
from pdtasks.settings import load_settings


async def answers(
    flags: dict[str, str], reasoning: dict[str, str], requests: list[list[Any]]
) -> list[tuple[int, str]]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.v1.engine.async_llm import AsyncLLM

    from api.flags import front_end_arguments

    settings = load_settings()
    model = resolve_model(settings.model, settings.cache_dir, lambda _: None)
    engine = None
    clients = {}
    for name, words in flags.items():
        arguments = front_end_arguments(words, model)
        for key, value in engine_arguments(settings, model).items():
            setattr(arguments, key, value)
        arguments.served_model_name = [settings.model_name]
        arguments.enable_log_requests = False
        if engine is None:
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(arguments))
        # Of the front half alone: the engine's grammars begin with the answer.
        parser = reasoning.get(name, "")
        arguments.structured_outputs_config.reasoning_parser = parser
        app = build_app(arguments, ("generate",), engine.model_config)
        await init_app_state(engine, app.state, arguments, ("generate",))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        clients[name] = httpx.AsyncClient(transport=transport, base_url="http://one", timeout=120)
    found = []
    for name, path, body in requests:
        begun = time.monotonic()
        response = await clients[name].post(path, json=body)
        found.append((response.status_code, response.text))
        print(f"{time.monotonic() - begun:.2f} s: request {len(found)}", flush=True)  # noqa: T201
    for client in clients.values():
        await client.aclose()
    if engine is not None:
        engine.shutdown()
    return found


if __name__ == "__main__":
    os.environ.update(TORCHDYNAMO_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    case = json.load(sys.stdin)
    found = asyncio.run(answers(case["flags"], case["reasoning"], case["requests"]))
    Path(sys.argv[1]).write_text(json.dumps(found))
