"""What validates, renders, tokenises and detokenises for one model? vLLM's own front half.

vLLM's OpenAI app holds one model: its handlers, its tokenizer and its engine client lie in the
app's state.  So each model that this process serves has such an app, with a pipeline of its own
behind it: queues, reply stream, line and places of one model are nothing to another.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app

from api import errors, responses
from api.core import PipelineCore
from api.engine_metrics import EngineMetrics
from api.flags import check_flags, front_end_arguments
from api.parameters import Parameters, Refusal
from api.recording import RecordingLLM
from pdtasks.engine.arguments import engine_arguments
from pdtasks.engine.models import resolve_model
from pdtasks.settings import Settings

_TASKS: Final = ("generate",)
#: Routes of vLLM's that are for other parts of a vLLM server, not for who asks it: by one of them
#: anybody ends anybody's requests whose id he knows.
_CLOSED: Final = frozenset(
    (
        *("/inference/v1/generate", "/inference/v1/abort_requests", "/kv_event_sources"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep"),
    )
)


class _Named(msgspec.Struct):
    model: Any = None


def model_in(body: bytes) -> Any:
    """What a request's body has for `model`; None: nothing, or it is no object."""
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        fields = json.loads(body)  # takes what others do not, NaN for one, as the routes do
    except (ValueError, RecursionError):
        return None
    return fields.get("model") if isinstance(fields, dict) else None


class Front:
    """The front half of the model that `settings` name."""

    client: RecordingLLM  #: from `open` on

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigurationError, for flags that cannot be used, and as `resolve_model` does."""
        self.settings = settings
        model = resolve_model(settings.model, settings.cache_dir, print)
        check_flags(settings.api_args)
        self._arguments = front_end_arguments(settings.api_args, model)
        for name, value in engine_arguments(settings, model).items():
            setattr(self._arguments, name, value)
        self._arguments.served_model_name = [settings.model_name]
        self.config = AsyncEngineArgs.from_cli_args(self._arguments).create_engine_config()
        self.app = build_app(self._arguments, _TASKS, self.config.model_config)
        routes = self.app.router.routes
        routes[:] = [route for route in routes if getattr(route, "path", "") not in _CLOSED]
        responses.install(self.app)
        errors.install(self.app)
        scheduler = self.config.scheduler_config
        self.parameters = Parameters(priorities=scheduler.policy == "priority")

    @property
    def name(self) -> str:
        """What callers call the model."""
        return self.settings.model_name

    @property
    def core(self) -> PipelineCore:
        """What stands for the model's engine. From `open` on."""
        return self.client.engine_core

    async def open(self) -> None:
        """Connect to bus and broker. Raises valkey.ValkeyError when the bus cannot be reached.

        Call `close` in either case.
        """
        self.client = RecordingLLM(self.config, self.settings)
        self.app.state.pdtasks_client = self.client
        await self.core.open()
        await init_app_state(self.client, self.app.state, self._arguments, _TASKS)

    async def close(self) -> None:
        """Tell the workers to drop what is left. Bounded."""
        if hasattr(self, "client"):
            await self.core.close()
            self.client.shutdown()


class Fronts:
    """Those of all models that this process serves; the default one's first."""

    def __init__(self, settings: Settings) -> None:
        """Raises as `Front` does."""
        each = [settings, *(settings.of_model(name) for name in settings.models)]
        self._by_name = {one.model_name: Front(one) for one in each}
        self._metrics = ExitStack()

    def __iter__(self) -> Iterator[Front]:
        return iter(self._by_name.values())

    def __contains__(self, model: str) -> bool:
        return model in self._by_name

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def default(self) -> Front:
        """Of the model that is asked where nobody names one."""
        return next(iter(self))

    @property
    def cores(self) -> Sequence[PipelineCore]:
        """Their engines'. From `open` on."""
        return [front.core for front in self]

    @property
    def without_workers(self) -> list[str]:
        """Models that nobody serves now. From `open` on."""
        return [front.name for front in self if not front.core.workers.is_alive]

    def of(self, model: Any) -> Front:
        """The one of `model`, as a body spells it; else the default one, which refuses the rest."""
        found = self._by_name.get(model) if isinstance(model, str) else None
        return found or self.default

    def refusal(self, path: str, headers: Mapping[bytes, bytes], body: bytes) -> Refusal | None:
        """`Parameters.refusal` of the model that `body` names."""
        model = model_in(body) if len(self) > 1 else None
        return self.of(model).parameters.refusal(path, headers, body)

    def refusal_of_fields(self, path: str, fields: Mapping[str, Any]) -> Refusal | None:
        """The same for a body that has been read."""
        return self.of(fields.get("model")).parameters.refusal_of_fields(path, fields)

    def app_of(self, model: Any) -> FastAPI:
        """The same one's application."""
        return self.of(model).app

    async def open(self) -> None:
        """All of them. Call `close` whatever it raises."""
        metrics = self._metrics.enter_context(EngineMetrics())
        for front in self:
            await front.open()
            if len(self) > 1:
                metrics.take()

    async def close(self) -> None:
        """All of them, side by side."""
        try:
            await asyncio.gather(*(front.close() for front in self))
        finally:
            self._metrics.close()
