"""Broker, bus and kv: which are private, which were configured, and do they answer?

What the settings name belongs to somebody else: it is asked whether it answers and otherwise left
alone.  What they do not name is started here, watched, and stopped at the end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pdtasks.cluster import children
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import Tick, broker_accepts, valkey_answers, wait_until
from pdtasks.cluster.process import Process, StartFailed, describe_exit
from pdtasks.cluster.rabbitmq import RabbitNode, server_programs
from pdtasks.cluster.rights import BROKER_RIGHTS, BUS_RIGHTS, REPLYING, User
from pdtasks.cluster.stack import home_marker, member_of, redact
from pdtasks.cluster.valkey import Kind, ValkeyServer, server_program
from pdtasks.running_stack import Member
from pdtasks.settings import Settings
from pdtasks.tls import why_untrusted

_CONFIGURED_S = 15.0  # for services that run already
#: A service that ends more often within so many seconds is given up.
_MOST_ENDS, _STEADY_S = 5, 600.0
_USES_BROKER_API: Final = (User.FLOWER,)
_USES_KV: Final = (User.WORKER,)


class Services:
    """The services of one stack."""

    def __init__(self, console: Console, tick: Tick) -> None:
        """Args:
        tick: called while something is waited for; may raise to give up.
        """
        self._console = console
        self._tick = tick
        self._private: list[tuple[str, RabbitNode | ValkeyServer]] = []  # in the order of starts
        self._operator_urls: dict[str, str] = {}
        self._ends: dict[str, deque[float]] = {}  # by name, when (monotonic) one ended by itself

    @property
    def any_private(self) -> bool:
        """Was at least one started here?"""
        return bool(self._private)

    @staticmethod
    def require_programs(settings: Settings) -> None:
        """Raises StartFailed when a program is missing that `start` would need."""
        if not settings.broker_url:
            server_programs()
        if not (settings.bus_url and settings.kv_urls):
            server_program()

    # -- start ------------------------------------------------------------------------------------

    def start(self, settings: Settings) -> Settings:
        """Start what `settings` do not name; returns them with the URLs of what was started.

        Raises StartFailed, or what `tick` raises; call `stop` and `close` in either case.
        """
        home, logs = settings.home, children.log_folder(settings)
        marker = dict([home_marker(home).split("=", 1)])

        def valkey(kind: Kind) -> ValkeyServer:
            return ValkeyServer(
                home / "valkey",
                kind,
                log=logs / f"valkey-{kind}.log",
                # Blocks can be computed again; jobs and results are all that there is of them.
                durable=kind == "bus",
                env=marker,
            )

        update: dict[str, Any] = {}
        if not settings.bus_url:
            update["bus_url"] = self._start("bus", valkey("bus"))
        if not settings.kv_urls:
            update["kv_urls"] = (self._start("kv", valkey("kv")),)
        if not settings.broker_url:
            node = RabbitNode(home / "rabbitmq", log=logs / "rabbitmq.log", env=marker)
            update["broker_url"] = self._start("broker", node)
            update["broker_api_url"] = node.api_url
        return settings.model_copy(update=update)

    def settings_for(self, user: User, settings: Settings) -> Settings:
        """What a child gets: the URLs of its own user, and none of a service that it does not use.

        A service that was configured has one URL for all.
        """
        update: dict[str, Any] = {}
        for _, service in self._private:
            if isinstance(service, RabbitNode):
                if user in BROKER_RIGHTS:
                    update["broker_url"] = service.url_for(user)
                if user in _USES_BROKER_API:
                    update["broker_api_url"] = service.api_url_for(user)
            elif service.kind == "bus" and user in BUS_RIGHTS:
                update["bus_url"] = service.url_for(user)
        # Empty and not None: else it would be looked for in the stack's file.
        uses = {
            "broker_url": user in BROKER_RIGHTS,
            "broker_api_url": user in _USES_BROKER_API,
            "bus_url": user in BUS_RIGHTS,
            "bus_urls": user in REPLYING,
            "kv_urls": user in _USES_KV,
        }
        update |= {n: () if n.endswith("s") else "" for n, used in uses.items() if not used}
        return settings.model_copy(update=update)

    def _start(self, role: str, service: RabbitNode | ValkeyServer) -> str:
        began = time.monotonic()
        name = "RabbitMQ" if role == "broker" else f"Valkey ({role})"
        self._private.append((role, service))

        def tick() -> None:
            self._console.progress(f"{time.monotonic() - began:4.0f} s  starting {name}")
            self._tick()

        url = service.start(tick)
        self._operator_urls[role] = service.operator_url
        if isinstance(service, RabbitNode):
            self._operator_urls["broker_api"] = service.operator_api_url
        self._console.good(f"{name} ready after {time.monotonic() - began:.1f} s")
        return url

    def check_configured(self, settings: Settings) -> None:
        """Services that were configured must answer before anything is built on them.

        Call it after `start`, with the settings that it returned. Raises StartFailed.
        """
        private = {role for role, _ in self._private}
        checks: Mapping[str, tuple[str, tuple[str, ...], Callable[[str], bool]]] = {
            "broker": ("broker", (settings.require_broker(),), broker_accepts),
            "bus": ("bus", (settings.require_bus(),), valkey_answers),
            "kv": ("kv server", settings.kv_urls, valkey_answers),
        }
        for role, (name, urls, accepts) in checks.items():
            for url in () if role in private else urls:
                self._check(name, url, accepts)
        for name, url in settings.further_buses.items():
            self._check(name, url, valkey_answers)

    def _check(self, name: str, url: str, accepts: Callable[[str], bool]) -> None:
        if not wait_until(lambda: accepts(url), _CONFIGURED_S, self._tick):
            if why := why_untrusted(url):
                raise StartFailed(f"the {name} at {redact(url)}: {why}")
            raise StartFailed(
                f"the {name} at {redact(url)} does not answer, or refuses the password: "
                "check that it runs and that its URL is right"
            )
        self._console.good(f"{name} at {redact(url)} answers")

    # -- watch ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Start again in its place what has ended by itself; who uses it connects again.

        Raises StartFailed when one does not come back, or ends again and again; what `tick` raises.
        """
        for _, service in self._private:
            for process in service.processes:
                process.bound_log()
            code = service.process.poll()
            if code is not None:
                self._start_again(service, f"ended by itself ({describe_exit(code)})")

    def _start_again(self, service: RabbitNode | ValkeyServer, why: str) -> None:
        now = time.monotonic()
        ends = self._ends.setdefault(service.process.name, deque())
        ends.append(now)
        while now - ends[0] > _STEADY_S:
            ends.popleft()
        if len(ends) > _MOST_ENDS:
            raise service.process.failure(f"{why}, {len(ends)} times in {_STEADY_S / 60:.0f} min")
        self._console.bad(f"{service.process.name} {why}, starting again")
        service.restart(self._tick)
        self._console.good(f"{service.process.name} is back after {time.monotonic() - now:.1f} s")

    # -- stop -------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop ours, the last one first. Raises what `tick` raises."""
        for role, service in reversed(self._private):
            service.stop(self._tick)
            self._console.line(f"  {role} stopped")

    def kill(self) -> None:
        """End ours at once."""
        for _, service in self._private:
            for process in service.processes:
                process.kill()

    def close(self) -> None:
        """Whatever happened before: nothing runs afterwards and no socket is left."""
        for _, service in self._private:
            service.stop()

    # -- for the record ---------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """The servers themselves."""
        return [member_of(process, role) for role, process in self._processes(slice(0, 1))]

    def helpers(self) -> list[Member]:
        """What else they need to run (epmd)."""
        return [member_of(process, role) for role, process in self._processes(slice(1, None))]

    def folders(self) -> list[Path]:
        """Folders outside home that hold their sockets."""
        return [
            service.temporary
            for _, service in self._private
            if isinstance(service, ValkeyServer) and service.temporary is not None
        ]

    def operator_urls(self) -> dict[str, str]:
        """By role, URLs with more rights than those in the settings."""
        return dict(self._operator_urls)

    def _processes(self, which: slice) -> list[tuple[str, Process]]:
        return [
            (role, process)
            for role, service in self._private
            for process in service.processes[which]
        ]
