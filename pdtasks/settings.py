"""Which options are there, and where do they come from?

The one reader of `PDTASKS_*`.  A value is looked for in the environment, then in the file of the
stack that runs on this host (`<home>/stack.json`, written by `pdtasks up`), then here: so a
worker started by hand beside a running stack joins it without further ado.  Celery's own options
live in `configs/celeryconfig.py`.
"""

from __future__ import annotations

import glob
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pdtasks.errors import ConfigurationError
from pdtasks.naming import EMBEDDED_MODEL, MODEL_NAME, queue_of
from pdtasks.running_stack import UnreadableStack, running_stack
from pdtasks.tls import celery_backend_url

#: Default of `short_prompt_tokens`, by device: docs/performance.md, "Short prompts".
SHORT_PROMPT_TOKENS: Final = {"cpu": 64, "cuda": 256}

#: How the URL of a bus begins.
_BUS_SCHEMES: Final = ("valkey://", "valkeys://", "redis://", "rediss://", "unix://")


def _server(url: str) -> str:
    """What of a bus's URL says which server it is: not the scheme, the user or TLS options."""
    return url.partition("://")[2].partition("?")[0].rpartition("@")[2].rstrip("/").lower()


def _default_home() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "pdtasks"


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pdtasks"


def _default_device() -> Literal["cpu", "cuda"]:
    # Device files, not torch: this runs in processes that never import it.
    return "cuda" if glob.glob("/dev/nvidia[0-9]*") else "cpu"


class FurtherModel(BaseModel):
    """A model beside the default one, and what goes with it: none of it is the default's.

    Whatever else an engine is told holds for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None  #: folder or Hugging Face name; None: the embedded model
    max_model_len: int | None = Field(default=None, gt=1)
    engine_args: dict[str, Any] = {}
    api_args: str = ""


def _spelt_out(value: object) -> object:
    return {"model": value} if isinstance(value, str) else value


class Settings(BaseSettings):
    """All options of pdtasks, validated. Read them with `load_settings()`."""

    model_config = SettingsConfigDict(env_prefix="PDTASKS_", frozen=True, extra="ignore")

    home: Path = Field(default_factory=_default_home)  #: state of the stack started on this host
    cache_dir: Path = Field(default_factory=_default_cache)  #: converted models

    broker_url: str | None = Field(default=None, repr=False)  #: RabbitMQ, amqp://… or amqps://…
    #: RabbitMQ's management API, for Flower's queue lengths.
    broker_api_url: str | None = Field(default=None, repr=False)
    #: Valkey for replies, presence and results, valkey://…
    bus_url: str | None = Field(default=None, repr=False)
    #: Further buses, for replies alone; the same list, in one order, for API and workers.
    bus_urls: Annotated[tuple[str, ...], NoDecode] = Field(default=(), repr=False)
    #: Valkey servers for KV blocks
    kv_urls: Annotated[tuple[str, ...], NoDecode] = Field(default=(), repr=False)

    model: str | None = None  #: folder or Hugging Face name; None: the embedded model
    served_model_name: str | None = None  #: name in the API; None: from `model`
    device: Literal["cpu", "cuda"] = Field(default_factory=_default_device)
    max_model_len: int | None = Field(
        default=None, gt=1
    )  #: tokens; None: the model's own; on CPU 2048
    max_num_seqs: int = Field(default=64, gt=0)  #: requests that one engine runs at once
    cpu_kv_cache_gib: int = Field(default=2, gt=0)  #: memory for KV of one CPU engine
    engine_args: dict[str, Any] = Field(default_factory=dict)  #: further vLLM engine arguments
    #: Models beside that one, by the name that callers ask for; a folder or Hugging Face name, or
    #: an object with the fields of `FurtherModel`. Each has queues of its own: docs/models.md.
    models: dict[
        Annotated[str, Field(pattern=f"^{MODEL_NAME}$")],
        Annotated[FurtherModel, BeforeValidator(_spelt_out)],
    ] = Field(default_factory=dict)

    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=4 * 2**20, gt=0)  #: of one HTTP request
    max_file_bytes: int = Field(default=100 * 2**20, gt=0)  #: of one uploaded file
    #: Who may ask: `pdtasks keys`, api/keys.py. None: `api-keys` in `home`, if that is there.
    api_keys_file: Path | None = None
    #: Listen beyond this host without asking for keys.
    api_open: bool = False
    #: Each API key's prompts have KV of their own, which requests of no other key find.
    salt_by_key: bool = False
    #: Requests of one API process that wait for the workers; more get a 429.
    max_waiting: int = Field(default=2000, gt=0)
    max_waiting_jobs: int = Field(default=100_000, gt=0)  #: jobs on the bus; more get a 429
    #: vLLM's own front-end flags, as on a command line: `--enable-auto-tool-choice …`.
    api_args: str = ""
    #: Where Flower listens. Beyond this host it asks for a login: `pdtasks/flower_login.py`.
    flower_host: str = "127.0.0.1"
    flower_port: int = Field(default=5555, ge=0, le=65535)

    #: Where a worker serves its metrics. Ports: a free one, unless one is named and nobody has it.
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535)

    kv_ttl_s: int = Field(default=3600, gt=0)  #: seconds an unused KV block lives
    #: Blocks that each engine rank moves at once: connections, and blocks of (pinned) host memory.
    kv_connections: int | None = Field(default=None, gt=0)  #: None: 4; on CUDA 8
    #: Seconds for the blocks of one engine step; then recompute.
    kv_timeout_s: float = Field(default=10.0, gt=0)
    #: Tokens from which a prefix that the store has is loaded and not computed.
    kv_min_prefix_tokens: int | None = Field(default=None, ge=0)  #: None: 128; on CUDA 512
    #: MiB of shared memory of each engine rank, for KV that engines of the same host read at once;
    #: 0: hand-overs wait for the kv server.
    kv_ring_mib: int | None = Field(default=None, ge=0)  #: None: 256; on CUDA 4096
    #: Engines of one host copy KV from GPU to GPU, out of each other's caches, where CUDA can.
    kv_gpu_to_gpu: bool = True
    #: Tokens up to which a prompt is computed by the decode worker that answers it: to hand it over
    #: would take longer.  0: decode workers compute no prompts, also where no prefill worker is.
    short_prompt_tokens: int | None = Field(default=None, ge=0)  #: None: 64; on CUDA 256
    result_ttl_s: int = Field(default=3600, gt=0)  #: seconds a result can be fetched
    job_concurrency: int = Field(default=64, gt=0)  #: jobs that one API process runs at once
    #: Lines of batches that one API process runs at once: each shares the engines' steps with
    #: requests that somebody waits for.
    batch_concurrency: int = Field(default=8, gt=0)
    #: Seconds that an uploaded file is kept, and a batch that has ended with its files.
    file_ttl_s: int = Field(default=7 * 24 * 3600, gt=0)
    request_timeout_s: float = Field(default=600.0, gt=0)  #: seconds from submission to answer
    worker_ttl_s: float = Field(default=10.0, gt=0)  #: seconds without a sign of life: gone
    #: Seconds that requests wait for a stage of which no worker is alive in any state.  Longer than
    #: the longest pause before a worker is started again (60 s).
    stage_grace_s: float = Field(default=90.0, gt=0)
    #: Seconds after which a worker that takes no jobs, for a reason of its own, is replaced.
    stall_timeout_s: float = Field(default=30.0, gt=0)
    #: Seconds that running requests get at a stop.  A stopping Celery worker sends no heartbeats:
    #: RabbitMQ would take a longer drain for a dead worker and hand its jobs to others.
    drain_timeout_s: float = Field(default=30.0, ge=0, le=45)
    delivery_limit: int = Field(default=3, gt=0)  #: deliveries of one job before it is given up

    @field_validator("bus_urls", "kv_urls", mode="before")
    @classmethod
    def _split_urls(cls, value: object) -> object:
        return (
            tuple(filter(None, map(str.strip, value.split(","))))
            if isinstance(value, str)
            else value
        )

    @field_validator("bus_urls")
    @classmethod
    def _check_buses(cls, urls: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        # (No word of a URL in what is raised: it holds a password.)
        if not all(url.startswith(_BUS_SCHEMES) for url in urls):
            raise ValueError(f"each is one of {', '.join(f'{s}…' for s in _BUS_SCHEMES)}")
        first = info.data.get("bus_url")
        servers = [*map(_server, urls), *([_server(first)] if first else ())]
        if len(set(servers)) < len(servers):
            raise ValueError(
                "names a bus twice: further ones are listed, beside that of PDTASKS_BUS_URL"
            )
        return urls

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        # (What `of_model` makes is not validated: there the name is one of them.)
        if self.model_name in self.models:
            raise ValueError(f"{self.model_name} is the default model's name: give it another")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _RunningStack(settings_cls)

    @property
    def model_name(self) -> str:
        """The name under which the API serves the model."""
        if self.served_model_name:
            return self.served_model_name
        return Path(self.model).name if self.model else EMBEDDED_MODEL

    def queue_of(self, stage: str, model: str | None = None) -> str:
        """The queue of jobs of `stage` for `model`; None: for the model of these settings."""
        name = model or self.model_name
        return queue_of(stage, name if name in self.models else "")

    def of_model(self, name: str) -> Settings:
        """The settings of what serves a further model.

        Raises ConfigurationError, which names those that there are.
        """
        found = self.models.get(name)
        if found is None:
            known = ", ".join(self.models) or "none"
            raise ConfigurationError(f"PDTASKS_MODELS has no model {name!r}, but: {known}")
        return self.model_copy(update=dict(found) | {"served_model_name": name})

    @property
    def short_prompts_up_to(self) -> int:
        """`short_prompt_tokens`, or what was measured to be right for the device."""
        if self.short_prompt_tokens is not None:
            return self.short_prompt_tokens
        return SHORT_PROMPT_TOKENS[self.device]

    @property
    def keys_file(self) -> Path:
        """Where the API keys are, or may come to be."""
        return self.api_keys_file or self.home / "api-keys"

    @property
    def further_buses(self) -> dict[str, str]:
        """`bus_urls` by the names under which people are told of them; the first one is `bus`."""
        return {f"bus{number}": url for number, url in enumerate(self.bus_urls, start=2)}

    @property
    def result_backend_url(self) -> str:
        """The bus as Celery's Redis backend spells it; `disabled://` without one."""
        if not self.bus_url:
            return "disabled://"
        return celery_backend_url(self.bus_url)

    def to_env(self) -> dict[str, str]:
        """`PDTASKS_*` variables that make another process read the same settings."""
        env = {}
        for name, value in self:
            if value is None:
                continue
            if isinstance(value, tuple):
                text = ",".join(value)
            else:
                text = _as_json(value) if isinstance(value, dict) else str(value)
            env[f"PDTASKS_{name.upper()}"] = text
        return env

    def require_broker(self) -> str:
        """The broker's URL. Raises ConfigurationError when none is known."""
        return self._require("broker_url")

    def require_bus(self) -> str:
        """The bus's URL. Raises ConfigurationError when none is known."""
        return self._require("bus_url")

    def require_kv(self) -> tuple[str, ...]:
        """The kv servers' URLs. Raises ConfigurationError when none is known."""
        self._require("kv_urls")
        return self.kv_urls

    def _require(self, name: str) -> str:
        value = getattr(self, name)
        if not value:
            raise ConfigurationError(
                f"no {name.partition('_')[0]} is known: start a stack with `pdtasks up`, "
                f"or set PDTASKS_{name.upper()}"
            )
        return str(value)


class _RunningStack(PydanticBaseSettingsSource):
    """Values from the stack that runs under `home`, if one does."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False  # all values come from __call__

    def __call__(self) -> dict[str, Any]:
        home = Path(self.current_state.get("home") or _default_home())
        try:
            stack = running_stack(home)
        except UnreadableStack:
            return {}  # damaged, or of another release: `pdtasks up` and `doctor` say so
        if stack is None:
            return {}
        env = stack.env
        prefix = "PDTASKS_"
        values = {k.removeprefix(prefix).lower(): v for k, v in env.items() if k.startswith(prefix)}
        values.pop("home", None)
        for name in ("engine_args", "models"):
            if isinstance(values.get(name), str):
                values[name] = json.loads(values[name])
        return values


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, default=lambda model: model.model_dump(exclude_defaults=True))


@cache
def load_settings() -> Settings:
    """The settings of this process, read once.

    Raises ConfigurationError naming each variable that cannot be used.
    """
    return make_settings()


def make_settings(**overrides: Any) -> Settings:
    """Settings with `overrides` over everything else.

    Raises ConfigurationError naming each variable that cannot be used, never its value.
    """
    try:
        return Settings(**overrides)
    except ValidationError as exc:
        problems = (
            f"PDTASKS_{'_'.join(map(str, error['loc'])).upper()}: {error['msg']}"
            for error in exc.errors(include_url=False, include_input=False)
        )
        raise ConfigurationError("; ".join(problems)) from None
    except SettingsError as exc:  # of a value that should be JSON; names the field in its text
        named = re.search(r'field "(\w+)"', str(exc))
        name = named[1].upper() if named else "*"
        raise ConfigurationError(f"PDTASKS_{name}: not valid JSON") from None
