"""Which commands, settings and folders do workers, API and Flower get?

What is here by argument can be typed by hand as well: `celery -A pdtasks worker -Q prefill …`.
Secrets travel by environment only, for everybody on a host can read a command line.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import site
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pdtasks
from pdtasks.cluster.placement import Placement
from pdtasks.cluster.process import Process, StartFailed
from pdtasks.flower_login import FLOWER_PREFIX, has_login
from pdtasks.keys import KEY_VARIABLE, KEYS_VARIABLE
from pdtasks.settings import Settings, make_settings

_TEMPORARY_PATH_LIMIT = 64  # bytes; vLLM adds a name of 36 and a socket's path may have 107


def stack_settings(**overrides: Any) -> Settings:
    """Settings with `overrides`, paths absolute: children run in another folder."""
    settings = make_settings(**overrides)
    absolute: dict[str, Any] = {
        "home": settings.home.expanduser().absolute(),
        "cache_dir": settings.cache_dir.expanduser().absolute(),
    }
    if (model := _absolute(settings.model)) != settings.model:
        absolute["model"] = model
        absolute["served_model_name"] = settings.model_name
    absolute["models"] = {
        name: further.model_copy(update={"model": _absolute(further.model)})
        for name, further in settings.models.items()
    }
    return settings.model_copy(update=absolute)


def _absolute(model: str | None) -> str | None:
    """A folder's whole path; a name as it is."""
    if model and (folder := Path(model).expanduser()).exists():
        return str(folder.absolute())
    return model


def worker(
    settings: Settings,
    placement: Placement,
    concurrency: int,
    temporary: Path,
    *,
    make: Callable[..., Process] = Process,
) -> Process:
    """One worker in its place. `make`: another way to start processes."""
    argv = ["celery", "-A", "pdtasks", "worker", "-Q", placement.queues]
    argv += ["-P", "threads", "-c", str(concurrency), "-n", f"{placement.name}@%h"]
    argv += ["-E", "--without-mingle", "--without-gossip", "-l", "INFO"]
    env = {
        **_temporary_env(settings, temporary),
    }
    return _python(placement.name, argv, settings, {**env, **placement.env}, make)


def api(
    settings: Settings,
    temporary: Path,
    *,
    name: str = "api",
    make: Callable[..., Process] = Process,
) -> Process:
    """The HTTP API. `name`: of one among several; `make`: another way to start processes."""
    argv = ["pdtasks.cli", "api", "--host", settings.api_host, "--port", str(settings.api_port)]
    # It computes nothing; torch's threads would only get in the engines' way.
    env = {"OMP_NUM_THREADS": "1", **_temporary_env(settings, temporary)}
    if keys := os.environ.get(KEYS_VARIABLE):  # no other child's business
        env[KEYS_VARIABLE] = keys
    return _python(name, argv, settings, env, make)


def flower(settings: Settings, cookie_secret: str) -> Process:
    """Flower. Raises StartFailed when its configuration is not installed."""
    found = importlib.util.find_spec("configs.flowerconfig")
    if found is None or found.origin is None:
        raise StartFailed("configs/flowerconfig.py is missing: install pdtasks again")
    argv = ["celery", "-A", "pdtasks", "flower", f"--conf={found.origin}"]
    argv += [f"--address={settings.flower_host}", f"--port={settings.flower_port}"]
    env = {name: value for name, value in os.environ.items() if name.startswith(FLOWER_PREFIX)}
    # The same after a restart, so that open pages go on.
    env |= {"FLOWER_COOKIE_SECRET": cookie_secret}
    if not has_login():
        # Only this host can connect, and the configuration allows looking only.
        env |= {"FLOWER_UNAUTHENTICATED_API": "true"}
    return _python("flower", argv, settings, env)


def balancer(settings: Settings, url: str, *, ttft_s: float, itl_s: float) -> Process:
    """What has workers change roles (`pdtasks.balance`).

    Args:
        url: of the API.
        ttft_s, itl_s: what callers are to get.
    """
    argv = ["pdtasks.cli", "balance", "--url", url, "--ttft", f"{ttft_s:g}", "--itl", f"{itl_s:g}"]
    key = os.environ.get(KEY_VARIABLE)
    return _python("balancer", argv, settings, {KEY_VARIABLE: key} if key else {})


def api_url(settings: Settings, port: int | None = None) -> str:
    """Where the API answers on this host. `port`: of one among several."""
    return _url(settings.api_host, settings.api_port if port is None else port)


def flower_url(settings: Settings) -> str:
    """Where Flower answers on this host."""
    return _url(settings.flower_host, settings.flower_port)


def _url(listens_on: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listens_on, listens_on)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def stack_urls(
    settings: Settings, *, flower: bool, api_ports: Sequence[int] = ()
) -> dict[str, str]:
    """Everything that is known to answer or will, by role; several with commas."""
    urls = {
        "api": ",".join(api_url(settings, port) for port in api_ports or [settings.api_port]),
        "broker": settings.broker_url,
        "bus": settings.bus_url,
        **settings.further_buses,
        "kv": ",".join(settings.kv_urls),
        "flower": flower_url(settings) if flower else None,
    }
    return {role: url for role, url in urls.items() if url}


def log_folder(settings: Settings) -> Path:
    """Where every child's log is."""
    return settings.home / "logs"


def rotate_logs(settings: Settings) -> None:
    """Make the log folder; logs of the stack that ran before stay one stack long, as `*.log.1`."""
    logs = log_folder(settings)
    logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    for log in logs.glob("*.log"):
        log.replace(log.with_name(log.name + ".1"))


def make_temporary(settings: Settings) -> Path:
    """A new folder for the engines' sockets, whose paths have to be short. Remove it at the end."""
    temporary = settings.home / "tmp"
    if len(os.fsencode(temporary)) > _TEMPORARY_PATH_LIMIT:
        return Path(tempfile.mkdtemp(prefix="pdtasks-", dir="/tmp"))  # mode 0700
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    return temporary


def common_env(settings: Settings) -> dict[str, str]:
    """The environment of any child."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PDTASKS_", FLOWER_PREFIX))}
    env |= settings.to_env()
    env |= {
        "PYTHONUNBUFFERED": "1",
        # A crash in native code says where, in the child's log.
        "PYTHONFAULTHANDLER": "1",
        # Nothing about this host or its requests goes to anybody.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Tokenizers in several threads and forks warn, and gain nothing here.
        "TOKENIZERS_PARALLELISM": "false",
    }
    models = (settings.model, *(settings.of_model(name).model for name in settings.models))
    if all(model is None or Path(model).is_dir() for model in models):
        env["HF_HUB_OFFLINE"] = "1"  # everything is here already
    root = str(Path(pdtasks.__file__).resolve().parent.parent)
    if root not in site.getsitepackages():  # a checkout
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    return env


def _python(
    name: str,
    argv: Sequence[str],
    settings: Settings,
    env: Mapping[str, str],
    make: Callable[..., Process] = Process,
) -> Process:
    return make(
        name,
        [sys.executable, "-m", *argv],
        env={**common_env(settings), **env},
        log=log_folder(settings) / f"{name}.log",
        cwd=settings.home,  # `python -m` looks for modules in the current folder first
    )


def _temporary_env(settings: Settings, temporary: Path) -> dict[str, str]:
    return {
        # vLLM leaves the sockets between its processes behind, more so when it is killed.
        "TMPDIR": str(temporary),
        # torch's compiled kernels lie there as well unless told otherwise; those are to stay.
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
            "TORCHINDUCTOR_CACHE_DIR", str(settings.cache_dir / "torchinductor")
        ),
    }
