"""What runs, in which state?  For `pdtasks status`, on this host or beside configured services.

Processes come from the stack's file, workers from their signs of life on the bus: so a worker that
was started by hand, on this host or another, is shown as well.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import valkey

from pdtasks.bus.presence import read_workers
from pdtasks.cluster.probes import broker_accepts, http_status, valkey_answers
from pdtasks.cluster.stack import redact
from pdtasks.messages import WorkerStatus
from pdtasks.naming import ROLES
from pdtasks.running_stack import Member, Stack, identify, read_stack
from pdtasks.settings import Settings
from pdtasks.tls import valkey_url


@dataclass(frozen=True)
class Row:
    """One service or worker."""

    name: str
    role: str
    pid: int | None  #: None: configured, not started by this stack
    state: str  #: one of `WORKER_STATES`, or "dead"
    active: int | None = None  #: requests in the worker's engine
    kv_usage: float | None = None  #: share of the engine's KV blocks that requests hold, 0 to 1
    reason: str = ""  #: of a worker: why it takes no jobs, or what is wrong although it does


@dataclass(frozen=True)
class Status:
    """Everything there is to tell; URLs without passwords."""

    services: tuple[Row, ...] = ()
    workers: tuple[Row, ...] = ()
    urls: dict[str, str] = field(default_factory=dict)

    @property
    def anything(self) -> bool:
        """Does anything run?"""
        return any(row.state != "dead" for row in (*self.services, *self.workers))

    def to_json(self) -> dict[str, Any]:
        """For `pdtasks status --json`; empty lists when nothing runs."""
        return asdict(self if self.anything else Status())


def read_status(settings: Settings) -> Status:
    """Ask everybody. Raises UnreadableStack."""
    stack = read_stack(settings.home)
    if stack is not None and not stack.supervisor.alive():
        return _left_behind(stack)
    if stack is None:
        urls = _configured_urls(settings)
        members: tuple[Member, ...] = ()
    else:
        urls = stack.urls
        members = stack.services
    draining = stack is not None and stack.state == "draining"
    present = _present_workers(urls.get("bus"))
    return Status(
        services=_services(urls, members, draining),
        workers=_workers(members, present, draining),
        urls={name: redact(url) for name, url in urls.items()},
    )


def format_status(status: Status) -> str:
    """A table for people."""
    if not status.anything:
        return "nothing runs here: start a stack with `pdtasks up`"
    rows = [("name", "role", "pid", "state", "active", "kv")]
    rows += [
        (
            row.name,
            row.role,
            str(row.pid or "-"),
            row.state + (f" ({row.reason})" if row.reason else ""),
            "-" if row.active is None else str(row.active),
            "-" if row.kv_usage is None else f"{row.kv_usage:.0%}",
        )
        for row in (*status.services, *status.workers)
    ]
    lines = _table(rows)
    lines += ["", *_table([(name, url) for name, url in status.urls.items()])]
    return "\n".join(lines)


def _configured_urls(settings: Settings) -> dict[str, str]:
    urls = {
        "broker": settings.broker_url,
        "bus": settings.bus_url,
        **settings.further_buses,
        "kv": ",".join(settings.kv_urls),
    }
    return {name: url for name, url in urls.items() if url}


def _left_behind(stack: Stack) -> Status:
    """The supervisor was killed; what it started may still be on its way out."""
    left = [
        Row(member.name, member.role, member.pid, "draining")
        for member in stack.services
        if member.identity.alive()
    ]
    return Status(
        services=tuple(row for row in left if row.role not in ROLES),
        workers=tuple(row for row in left if row.role in ROLES),
    )


def _services(urls: dict[str, str], members: Sequence[Member], draining: bool) -> tuple[Row, ...]:
    probes: dict[str, Callable[[str], bool]] = {
        "broker": broker_accepts,
        "bus": valkey_answers,
        **dict.fromkeys(filter(_is_further_bus, urls), valkey_answers),
        "kv": lambda url: all(valkey_answers(one) for one in url.split(",")),
        "api": lambda url: http_status(f"{url}/health") == 200,
        "flower": lambda url: http_status(f"{url}/healthcheck") == 200,
        "balancer": lambda _: True,  # it serves nothing
    }
    rows = []
    for role, answers in probes.items():
        started = [member for member in members if member.role == role]
        if not started and (role not in urls or role in ("api", "flower", "balancer")):
            continue  # not there, or not begun
        url = "" if role == "balancer" else urls.get(role)
        # Several API processes have a URL each, in the order of their start.
        own = url.split(",") if url and role == "api" else [url]
        asked: list[Member | None] = [*started] or [None]
        for member, its in itertools.zip_longest(asked, own[: len(asked)]):
            alive = member is None or member.identity.alive()
            if alive and draining:
                state = "draining"
            elif alive and its is not None and answers(its):
                state = "ready"
            else:
                state = "starting" if member is not None and alive else "dead"
            name, pid = (role, None) if member is None else (member.name, member.pid)
            rows.append(Row(name, role, pid, state))
    return tuple(rows)


def _is_further_bus(role: str) -> bool:
    return role.startswith("bus") and role != "bus"


def _present_workers(bus_url: str | None) -> list[WorkerStatus]:
    if bus_url is None:
        return []
    with (
        contextlib.suppress(valkey.ValkeyError, OSError),
        valkey.Valkey.from_url(
            valkey_url(bus_url), socket_timeout=1, socket_connect_timeout=1
        ) as bus,
    ):
        return read_workers(bus)
    return []


def _workers(
    members: Sequence[Member], present: Sequence[WorkerStatus], draining: bool
) -> tuple[Row, ...]:
    own = {member.pid: member for member in members if member.role in ROLES}
    names = {member.name for member in own.values()}
    here = socket.gethostname()
    rows = []
    for status in present:
        local = status.host == here
        if local and status.pid not in own and status.name.partition("@")[0] in names:
            continue  # the last sign of life of a worker that was started again since
        dead = local and identify(status.pid) is None
        rows.append(
            Row(
                status.name,
                status.role,
                status.pid,
                "dead" if dead else status.state,
                0 if dead else status.active,
                0.0 if dead else status.kv_usage,
                "" if dead else status.reason,
            )
        )
    seen = {status.pid for status in present if status.host == here}
    for member in own.values():
        if member.pid not in seen:
            alive = member.identity.alive()
            state = ("draining" if draining else "starting") if alive else "dead"
            rows.append(Row(member.name, member.role, member.pid, state, 0, 0.0))
    return tuple(sorted(rows, key=lambda row: (ROLES.index(row.role), row.name)))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
