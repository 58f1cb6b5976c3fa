"""What does each fault do, and how is it undone?"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import httpx
import psutil
import valkey

from pdtasks.bench.chaos.schedule import Kind, Planned
from pdtasks.bench.chaos.stack import ChaosStack
from pdtasks.cluster.parts import Part
from pdtasks.cluster.process import Process
from pdtasks.cluster.rabbitmq import RabbitNode
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.naming import DECODE, PREFILL

T = TypeVar("T")

#: vLLM names the process so (`setproctitle`).
_ENGINE_CORE = "EngineCore"
_NOT_NOW = (httpx.HTTPError, subprocess.SubprocessError, valkey.ValkeyError, psutil.Error)
_NO_MEMORY = "0.000001"
_ENOUGH_MEMORY = "0.4"


@dataclass(frozen=True)
class Acting:
    """A fault that acts now."""

    target: str
    undo: Callable[[], object] | None = None  #: None: there is nothing to undo


class Faults:
    """Does things to a stack."""

    def __init__(self, stack: ChaosStack) -> None:
        self._stack = stack
        self._actions: dict[Kind, Callable[[float], Acting]] = {
            Kind.KILL_PREFILL: partial(self._kill, PREFILL),
            Kind.KILL_DECODE: partial(self._kill, DECODE),
            Kind.KILL_ENGINE: self._kill_engine,
            Kind.FREEZE_ENGINE: self._freeze_engine,
            Kind.KILL_API: partial(self._kill, "api"),
            Kind.STOP_WORKER: self._stop_worker,
            Kind.FREEZE_WORKER: self._freeze_worker,
            Kind.FREEZE_API: self._freeze_api,
            Kind.FREEZE_BROKER: lambda _: _freeze("broker", stack.broker.process),
            Kind.FREEZE_BUS: lambda _: _freeze("bus", stack.bus.process),
            Kind.FREEZE_KV: lambda _: _freeze("kv", stack.kv.process),
            Kind.RESTART_BROKER: partial(self._restart, "broker", stack.broker),
            Kind.RESTART_BUS: partial(self._restart, "bus", stack.bus),
            Kind.RESTART_KV: partial(self._restart, "kv", stack.kv),
            Kind.FLUSH_KV: self._flush_kv,
            Kind.CUT_ONE: self._cut_one,
            Kind.CUT_ALL: self._cut_all,
            Kind.MEMORY_ALARM: self._memory_alarm,
        }

    def begin(self, fault: Planned) -> Acting:
        """Do it; whoever calls has it undone."""
        try:
            return self._actions[fault.kind](fault.pick)
        except _NOT_NOW as exc:
            # The part has not come back from the fault before.
            return Acting(f"nobody: {type(exc).__name__}")

    # -- processes -------------------------------------------------------------------------------

    def _kill(self, role: str, pick: float) -> Acting:
        part = _choose(self._parts(role), pick)
        part.process.kill()
        return Acting(part.name)

    def _kill_engine(self, pick: float) -> Acting:
        part = _choose(self._parts(PREFILL, DECODE), pick)
        if (engine := _engine_of(part)) is None:
            return Acting(f"nobody: {part.name} has no engine now")
        engine.kill()
        return Acting(f"engine of {part.name}")

    def _freeze_engine(self, pick: float) -> Acting:
        part = _choose(self._parts(PREFILL, DECODE), pick)
        if (engine := _engine_of(part)) is None:
            return Acting(f"nobody: {part.name} has no engine now")

        def thaw() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):  # its worker was replaced
                engine.resume()

        engine.suspend()
        return Acting(f"engine of {part.name}", thaw)

    def _stop_worker(self, pick: float) -> Acting:
        part = _choose(self._parts(PREFILL, DECODE), pick)
        part.process.request_stop()
        return Acting(part.name)

    def _freeze_worker(self, pick: float) -> Acting:
        part = _choose(self._parts(PREFILL, DECODE), pick)
        return _freeze(part.name, part.process)

    def _freeze_api(self, pick: float) -> Acting:
        part = _choose(self._parts("api"), pick)
        return _freeze(part.name, part.process)

    def _parts(self, *roles: str) -> list[Part]:
        """Those that are at work; else all."""
        found = [p for p in (*self._stack.workers, *self._stack.apis) if p.role in roles]
        return [p for p in found if p.ready and p.process.running] or found

    # -- services --------------------------------------------------------------------------------

    def _restart(self, name: str, service: RabbitNode | ValkeyServer, pick: float) -> Acting:
        """Every second time it has no time to end in order."""
        crashes = pick < 0.5
        if crashes:
            service.process.kill()
        service.restart(self._stack.watch_parts)
        return Acting(f"{name}, killed" if crashes else name)

    def _flush_kv(self, pick: float) -> Acting:
        with valkey.Valkey.from_url(self._stack.kv.operator_url, socket_timeout=5) as kv:
            kv.flushall()
        return Acting("kv")

    def _cut_one(self, pick: float) -> Acting:
        with httpx.Client(base_url=self._stack.broker.api_url, timeout=10, trust_env=False) as api:
            names = sorted(c["name"] for c in api.get("connections").json())
            if not names:
                return Acting("nobody: no connection is listed")
            name = _choose(names, pick)
            api.delete(f"connections/{name}", headers={"X-Reason": "chaos"})
        return Acting(f"connection {name}")

    def _cut_all(self, pick: float) -> Acting:
        self._stack.broker.control("close_all_connections", "chaos")
        return Acting("all connections")

    def _memory_alarm(self, pick: float) -> Acting:
        set_limit = partial(self._stack.broker.control, "set_vm_memory_high_watermark")
        set_limit(_NO_MEMORY)
        return Acting("broker", partial(set_limit, _ENOUGH_MEMORY))


def _engine_of(part: Part) -> psutil.Process | None:
    """The process of its engine core; None while there is none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(part.process.pid).children(recursive=True):
            if _ENGINE_CORE in child.name() or any(_ENGINE_CORE in w for w in child.cmdline()):
                return child
    return None


def _freeze(name: str, process: Process) -> Acting:
    process.signal(signal.SIGSTOP)
    return Acting(name, partial(process.signal, signal.SIGCONT))


def _choose(of: Sequence[T], pick: float) -> T:
    return of[int(pick * len(of))]
