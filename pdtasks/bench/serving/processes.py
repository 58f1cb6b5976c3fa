"""How is a topology started and ended?"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtasks.bench.serving.plan import Topology
from pdtasks.cluster.probes import free_ports, http_status
from pdtasks.cluster.process import Process

#: The model's name in every API.
MODEL = "m"
_START_S = 420.0  # CUDA graphs of an 8B model take two minutes
_STOP_S = 60.0
_POLL_S = 0.2
_NIXL: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}

#: Settings of pdtasks that are vLLM's arguments; the others go into PDTASKS_ENGINE_ARGS.
_SETTINGS = ("max_model_len", "max_num_seqs")


@dataclass(frozen=True)
class Running:
    """A topology that answers."""

    url: str
    reports: bool  #: of each request, by pdtasks' stages


@dataclass(frozen=True)
class Host:
    """What all topologies have in common."""

    model: str  #: folder with `config.json` and tokenizer, or a name
    device: str  #: cpu or cuda
    progress: Callable[[str], None]

    @contextmanager
    def started(
        self, topology: Topology, *, engine: Mapping[str, Any], folder: Path, limit_s: float
    ) -> Iterator[Running]:
        """Start `topology`, wait until it answers, end all of it on leaving.

        Args:
            engine: vLLM's arguments of each engine, by their Python names.
            folder: for logs and state.
            limit_s: seconds in which all must be ready.

        Raises StartFailed with the last lines of the log of what did not start.
        """
        until = time.monotonic() + min(limit_s, _START_S)
        with ExitStack() as stack:
            if topology.kind == "pdtasks":
                behind, front = [], self._pdtasks(topology, engine, folder)
            else:
                behind = [
                    self._engine(number, topology, engine, folder)
                    for number in range(len(topology.devices))
                ]
                front = _proxy(topology, behind, folder) if len(behind) > 1 else behind.pop()
            # Engines take minutes to start: all at once.
            for parts in (behind, [front]):
                for part in parts:
                    stack.callback(part.process.stop, _STOP_S)
                    part.process.start()
                for part in parts:
                    _wait(part, until, self.progress)
            yield Running(front.url, topology.kind == "pdtasks")

    def _engine(
        self, number: int, topology: Topology, engine: Mapping[str, Any], folder: Path
    ) -> _Part:
        (port,) = free_ports(1)
        own = ",".join(map(str, topology.devices[number]))
        place = "CUDA_VISIBLE_DEVICES" if self.device == "cuda" else "VLLM_CPU_OMP_THREADS_BIND"
        env = dict(os.environ) | {place: own} | topology.env
        arguments = dict(engine)
        if topology.kind == "nixl":
            arguments["kv_transfer_config"] = _NIXL
            (env["VLLM_NIXL_SIDE_CHANNEL_PORT"],) = map(str, free_ports(1))
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
            *("--model", self.model, "--served-model-name", MODEL),
            *("--host", "127.0.0.1", "--port", str(port), *flags_of(arguments)),
        ]
        name = f"engine{number}"
        return _Part(Process(name, command, env=env, log=folder / f"{name}.log"), port, "/health")

    def _pdtasks(self, topology: Topology, engine: Mapping[str, Any], folder: Path) -> _Part:
        (port,) = free_ports(1)
        env = dict(os.environ) | settings_of(engine)
        env |= {
            "PDTASKS_HOME": str(folder / "home"),
            "PDTASKS_MODEL": self.model,
            "PDTASKS_SERVED_MODEL_NAME": MODEL,
            "PDTASKS_DEVICE": self.device,
        }
        if self.device == "cuda":
            # In this order they are given to prefill workers, decode workers, and those for both.
            devices = [str(device) for own in topology.devices for device in own]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        command = [
            *(sys.executable, "-m", "pdtasks.cli", "up", "--port", str(port), "--no-flower"),
            *("--prefill", str(topology.prefill), "--decode", str(topology.decode)),
            *("--both", str(topology.both)),
        ]
        if "max_num_seqs" in engine:
            command += ["--concurrency", str(engine["max_num_seqs"])]
        log = folder / "pdtasks.log"
        ready = "/ready?split=true"
        return _Part(Process("pdtasks", command, env=env | topology.env, log=log), port, ready)


@dataclass(frozen=True)
class _Part:
    """One process that answers on a port of its own."""

    process: Process
    port: int
    ready: str  #: path that answers 200 when it is ready

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def flags_of(arguments: Mapping[str, Any]) -> list[str]:
    """vLLM's arguments as its command line takes them."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            flags += [f"--{flag}", text]
    return flags


def settings_of(arguments: Mapping[str, Any]) -> dict[str, str]:
    """vLLM's arguments as PDTASKS_* variables."""
    own = {f"PDTASKS_{k.upper()}": str(v) for k, v in arguments.items() if k in _SETTINGS}
    rest = {k: v for k, v in arguments.items() if k not in _SETTINGS}
    return own | {"PDTASKS_ENGINE_ARGS": json.dumps(rest)}


def _proxy(topology: Topology, behind: list[_Part], folder: Path) -> _Part:
    (port,) = free_ports(1)
    urls = [part.url for part in behind]
    prefill = urls[: topology.prefill]
    command = [
        *(sys.executable, "-m", "pdtasks.bench.serving.proxy", str(port)),
        *(word for url in prefill for word in ("--prefill", url)),
        *urls[topology.prefill :],
    ]
    log = folder / "proxy.log"
    return _Part(Process("proxy", command, env=dict(os.environ), log=log), port, "/health")


def _wait(part: _Part, until: float, progress: Callable[[str], None]) -> None:
    began = told = time.monotonic()
    while http_status(part.url + part.ready) != 200:
        now = time.monotonic()
        if not part.process.running:
            raise part.process.failure("ended before it was ready")
        if now > until:
            raise part.process.failure(f"was not ready within {now - began:.0f} s")
        if now - told > 20:
            progress(f"waiting for {part.process.name}: {now - began:.0f} s")
            told = now
        time.sleep(_POLL_S)
