"""The reference: vLLM's own OpenAI app over one ordinary engine, no connector. Run as a program.

Reads from standard input `{"flags": {name: "…"}, "reasoning": {name: parser}, "requests": [[[name,
path, body], …], …]}`, sends one group of requests after the other, each request to the app with the
flags of that name, and appends each answer, a line `[status, text]`, to the file named on the
command line.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import httpx

from pdtasks.engine.arguments import engine_arguments
from pdtasks.engine.models import resolve_model
from pdtasks.settings import load_settings


async def answer(
    flags: dict[str, str], reasoning: dict[str, str], groups: list[list[list[Any]]], out: TextIO
) -> None:
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
    for group in groups:
        asked = [clients[name].post(path, json=body) for name, path, body in group]
        answers = await asyncio.gather(*asked)
        out.writelines(json.dumps([a.status_code, a.text]) + "\n" for a in answers)
        out.flush()
    for client in clients.values():
        await client.aclose()
    if engine is not None:
        engine.shutdown()


if __name__ == "__main__":
    os.environ.update(TORCHDYNAMO_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1")
    # One core, as a worker has: with other threads the last bits of long prompts differ.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    # It is in nobody's way: what it answers is waited for, what runs beside it may be timed.
    os.nice(10)
    case = json.load(sys.stdin)
    with Path(sys.argv[1]).open("a") as answers:
        asyncio.run(answer(case["flags"], case["reasoning"], case["requests"], answers))
