"""Is it there? Questions to services and ports, and the patience to wait for a yes."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import valkey

from pdtasks.bus.keys import PROBE
from pdtasks.errors import ConfigurationError
from pdtasks.tls import amqp_arguments, valkey_url

#: Called while something is waited for; may raise to give up.
Tick = Callable[[], None]

#: Below are ports that services are known by; fewer others than this are not enough to choose from.
_FIRST_PORT = 10_000
_ENOUGH_PORTS = 1000
_POLL_S = 0.05
_TIMEOUT_S = 1.0


def wait_until(condition: Callable[[], bool], deadline_s: float, tick: Tick | None = None) -> bool:
    """Wait for `condition`; False when it did not come true in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        if tick is not None:
            tick()
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_S)
    return True


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody uses now, all different.

    None of those that the kernel gives to whoever asks for any, a connection that goes out for
    example: it would be taken before its server listens, some seconds later.
    """
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            sock = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", _some_port()))
                ports.append(int(sock.getsockname()[1]))
        return ports


def _some_port() -> int:
    """One that the kernel gives to nobody; 0, any, where it gives all."""
    try:
        given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        lowest, highest = int(given[0]), int(given[1])
    except (OSError, ValueError, IndexError):
        return 0
    own = [*range(_FIRST_PORT, lowest), *range(max(_FIRST_PORT, highest + 1), 1 << 16)]
    return secrets.choice(own) if len(own) >= _ENOUGH_PORTS else 0


def port_is_taken(host: str, port: int) -> bool:
    """Would a server fail to listen there because somebody else does?"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            sock.bind((host, port))
        except OSError as exc:
            return exc.errno == errno.EADDRINUSE
    return False


def choose_port(what: str, host: str, port: int, option: str) -> int:
    """`port`, or a free one for 0.

    Args:
        what: what is to listen there, for messages.
        option: where a person chooses another one, for messages.

    Raises ConfigurationError when the port is in use.
    """
    if port == 0:
        return free_ports(1)[0]
    if port_is_taken(host, port):
        raise ConfigurationError(
            f"{what} cannot listen on port {port} of {host}, which is in use: "
            f"choose another one with {option}, or stop what uses it"
        )
    return port


def accepts_connections(port: int, host: str = "127.0.0.1") -> bool:
    """Does somebody listen there?"""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_TIMEOUT_S):
        return True
    return False


def http_status(url: str) -> int | None:
    """The status with which `url` answers; None when nobody does."""
    # Without the proxy that the environment may name: all of these are on this host.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as exc:
        exc.close()
        return exc.code
    except (OSError, ValueError):
        return None


def valkey_answers(url: str) -> bool:
    """Does the server at `url` take our password and answer PING?"""
    try:
        with valkey.Valkey.from_url(
            valkey_url(url).removeprefix("cluster+"),
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
        ) as server:
            return bool(server.ping())
    except (valkey.ValkeyError, OSError):
        return False


def valkey_takes_writes(server: valkey.Valkey) -> bool:
    """Does it store a small value? Not when it is full, or the copy of another server."""
    try:
        return bool(server.set(PROBE, b"", px=1000))
    except (valkey.ValkeyError, OSError):
        return False


def broker_accepts(url: str) -> bool:
    """Does the broker at `url` open a connection for this user?"""
    from amqp.exceptions import AMQPError
    from kombu import Connection

    try:
        with Connection(**amqp_arguments(url), connect_timeout=_TIMEOUT_S) as connection:
            connection.connect()
    except (OSError, AMQPError):
        return False
    return True
