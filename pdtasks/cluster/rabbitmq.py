"""How is the private RabbitMQ node started?

::

    with RabbitNode(home / "rabbitmq") as node:  # killed in the end
        node.url                         # amqp://pdtasks:<password>@127.0.0.1:<port>/pdtasks
        node.url_for(User.WORKER)        # with that user's rights and no more (`rights.py`)
        node.operator_url                # with all rights, for a person
        node.api_url                     # http://pdtasks:<password>@127.0.0.1:<port>/api/

`start(tick=None) -> url`, `stop()` and `kill()` by hand; `restart()` keeps every address.  The
node runs as the current user from the distribution's package (3.10 on Debian 12) or a newer one on
PATH, with everything it keeps inside `directory`.  Each start takes free ports, all on loopback,
and new random passwords; queues and their messages stay from one start to the next.

* The packaged command switches to the user `rabbitmq`, so the script behind it is called.
* epmd, which Erlang nodes use to find each other, normally stays behind as a daemon that listens
  everywhere.  Ours is a child of its own, on loopback, and ends with the node.
* The users come from a definitions file, which RabbitMQ applies at each start and which holds only
  the passwords' hashes: `default_pass` would count only for an empty data directory.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from pdtasks.cluster.probes import (
    Tick,
    accepts_connections,
    broker_accepts,
    free_ports,
    http_status,
    wait_until,
)
from pdtasks.cluster.process import Process, StartFailed
from pdtasks.cluster.rights import BROKER_RIGHTS, OPERATOR, VHOST, User
from pdtasks.naming import EXCHANGE

#: The data directory belongs to this name; our own epmd keeps it from meeting another node.
NODE = "pdtasks@localhost"

_START_S = 90.0
_STOP_S = 30.0
_CONTROL_S = 60.0
_ATTEMPTS = 3
#: A decode job is acknowledged when it is finished; RabbitMQ's own limit is 30 min.
_CONSUMER_TIMEOUT_MS = 2 * 3600 * 1000

_CONFIG = """\
listeners.tcp.default = 127.0.0.1:{amqp}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management}
load_definitions = {definitions}
consumer_timeout = {consumer_timeout}
# The write-ahead log of quorum queues is kept in memory as well; its own limit is 512 MiB.
raft.wal_max_size_bytes = 67108864
"""
#: A quorum queue delivers a message when it is in the log, and not only when the disk has that for
#: sure: 2.0 instead of 2.8 ms from publish to consumer (medians).  A node that is killed loses
#: nothing, the kernel has it.  A host that loses power may lose the last milliseconds; the bus,
#: whose file reaches the disk each second, loses more.
_ADVANCED = "[{ra, [{wal_write_strategy, sync_after_notify}]}].\n"


class RabbitNode:
    """One private node."""

    def __init__(
        self, directory: Path, *, log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """Args:
        directory: everything the node keeps; made if it is not there.
        env: further variables for its processes, by which others recognise them.
        """
        self._passwords: dict[str, str] = {}  # by user
        self._amqp = self._management = 0  # ports
        self._directory = directory.resolve()
        self._log = log or self._directory / "rabbitmq.log"
        self._env = dict(env or {})
        self._node_env: dict[str, str] = {}
        self._epmd: Process | None = None
        self._node: Process | None = None

    @property
    def url(self) -> str:
        """For `pdtasks`, which may do what all roles may."""
        return self.url_for(User.ALL)

    @property
    def operator_url(self) -> str:
        """With all rights."""
        return self._url(OPERATOR)

    @property
    def api_url(self) -> str:
        """The management API for `pdtasks`."""
        return self.api_url_for(User.ALL)

    @property
    def operator_api_url(self) -> str:
        """The management API with all rights."""
        return self._api_url(OPERATOR)

    def url_for(self, user: User) -> str:
        """The node for one of the users of `rights.BROKER_RIGHTS`."""
        return self._url(user)

    def api_url_for(self, user: User) -> str:
        """The management API for a user that has a tag."""
        return self._api_url(user)

    def _url(self, user: str) -> str:
        return f"amqp://{user}:{self._passwords[user]}@127.0.0.1:{self._amqp}/{VHOST}"

    def _api_url(self, user: str) -> str:
        return f"http://{user}:{self._passwords[user]}@127.0.0.1:{self._management}/api/"

    @property
    def process(self) -> Process:
        """The node itself."""
        if self._node is None:
            raise RuntimeError("rabbitmq was not started")
        return self._node

    @property
    def processes(self) -> tuple[Process, ...]:
        """Everything that `stop` ends, the node first."""
        return tuple(p for p in (self._node, self._epmd) if p is not None)

    def start(self, tick: Tick | None = None) -> str:
        """Start the node and return its AMQP URL. Raises StartFailed."""
        script, epmd = server_programs()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._start(script, epmd, tick)
            except StartFailed as exc:
                self.stop()
                # Somebody else took a free port between our look and the node's bind.
                taken = "eaddrinuse" in str(exc).lower() or "already in use" in str(exc).lower()
                if not taken or attempt == _ATTEMPTS:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("unreachable")

    def _start(self, script: Path, epmd: str, tick: Tick | None) -> str:
        amqp, management, distribution, names = free_ports(4)
        self._passwords = {user: secrets.token_hex(24) for user in (*BROKER_RIGHTS, OPERATOR)}
        self._amqp, self._management = amqp, management
        env = self._prepare(amqp, management, distribution, names)
        self._node_env = env

        self._epmd = Process(
            "epmd",
            [epmd, "-port", str(names), "-address", "127.0.0.1"],
            env=env,
            log=self._log.with_name("epmd.log"),
        )
        self._epmd.start()
        if not wait_until(lambda: accepts_connections(names), 10, tick):
            raise self._epmd.failure("did not start")

        self._node = Process("rabbitmq", [str(script)], env=env, log=self._log)
        self._run(self._node, tick)
        return self.url

    def _run(self, node: Process, tick: Tick | None) -> None:
        node.start()
        management = f"{self.api_url.partition('@')[2]}overview"

        def serves() -> bool:  # 401: the management API is up and wants a password
            return http_status(f"http://{management}") == 401

        ready = wait_until(
            lambda: not node.running or (serves() and broker_accepts(self.url)),
            _START_S,
            tick,
        )
        if not node.running:
            raise node.failure("stopped while it started", _first_errors(node))
        if not ready:
            raise node.failure(f"was not ready within {_START_S:.0f} s")

    def restart(self, tick: Tick | None = None) -> None:
        """Stop the node and start it where it was: same ports, passwords, queues and messages.

        Raises StartFailed.
        """
        self.process.stop(_STOP_S, tick)
        self._run(self.process, tick)

    def control(self, *command: str, stdin: str = "") -> str:
        """Run a command of the node's own tool, `rabbitmqctl`; returns what it prints.

        Raises subprocess.SubprocessError when it fails or takes longer than a minute.
        """
        # Of the server's start alone: the tool would take them for its own.
        own = ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "RUNNING_UNDER_SYSTEMD")
        env = {name: value for name, value in self._node_env.items() if name not in own}
        tool = server_programs()[0].with_name("rabbitmqctl")
        done = subprocess.run(
            [str(tool), *command],
            env=env,
            check=True,
            capture_output=True,
            text=True,
            input=stdin,
            timeout=_CONTROL_S,
        )
        return done.stdout

    def _prepare(self, amqp: int, management: int, distribution: int, names: int) -> dict[str, str]:
        """Write the node's files; returns its environment."""
        home = self._directory
        for folder in (home, home / "mnesia", home / "conf.d", home / "home"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        definitions = home / "definitions.json"
        _write(definitions, json.dumps(_definitions(self._passwords)))
        _write(
            home / "rabbitmq.conf",
            _CONFIG.format(
                amqp=amqp,
                management=management,
                definitions=definitions,
                consumer_timeout=_CONSUMER_TIMEOUT_MS,
            ),
        )
        _write(home / "advanced.config", _ADVANCED)
        _write(home / "enabled_plugins", "[rabbitmq_management].\n")
        _write(home / "rabbitmq-env.conf", "")
        cookie = home / "home" / ".erlang.cookie"
        if not cookie.exists():  # Erlang would make one itself, from a weak random number
            _write(cookie, secrets.token_hex(24), mode=0o400)

        schedulers = min(4, len(os.sched_getaffinity(0)))
        # A small environment of its own: no other node's configuration reaches this one.
        return self._env | {
            "HOME": str(home / "home"),
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": NODE,
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(home),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(home / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(home / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "config"),
            "RABBITMQ_PID_FILE": str(home / "rabbitmq.pid"),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"+S {schedulers}:{schedulers}",
            # Makes the script exec the node, so that our signals reach it and not a shell.
            "RUNNING_UNDER_SYSTEMD": "true",
            "ERL_EPMD_PORT": str(names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # For every Erlang program that the node starts as well.
            "ERL_AFLAGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_CRASH_DUMP_SECONDS": "0",  # none: megabytes that nobody reads
        }

    def stop(self, tick: Tick | None = None) -> None:
        """Stop the node, then its epmd; harmless when they do not run."""
        try:
            if self._node is not None:
                self._node.stop(_STOP_S, tick)
        finally:
            if self._epmd is not None:
                self._epmd.kill()

    def kill(self) -> None:
        """End both at once: for a node whose data nobody wants any more.

        (`stop` takes 6 s: in 5 of them RabbitMQ's management plugin waits for what is stopping.)
        """
        for process in self.processes:
            process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()


def server_programs() -> tuple[Path, str]:
    """RabbitMQ's start script and epmd. Raises StartFailed when the package is missing."""
    candidates = []
    on_path = shutil.which("rabbitmq-server")
    if on_path:
        candidates.append(Path(on_path).resolve())
    candidates.append(Path("/usr/lib/rabbitmq/bin/rabbitmq-server"))
    candidates += sorted(Path("/usr/lib/rabbitmq/lib").glob("*/sbin/rabbitmq-server"))
    # On PATH lies a link to the distribution's wrapper, which has another name.
    script = next((c for c in candidates if _is_start_script(c)), None)
    epmd = shutil.which("epmd")
    if epmd is None:
        found = sorted(Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))
        epmd = str(found[-1]) if found else None
    if script is None or epmd is None:
        missing = "RabbitMQ" if script is None else "Erlang's epmd"
        raise StartFailed(
            f"{missing} is not installed: `apt-get install --no-install-recommends "
            "rabbitmq-server`, or set PDTASKS_BROKER_URL to a running broker"
        )
    return script, epmd


def _is_start_script(path: Path) -> bool:
    return path.name == "rabbitmq-server" and path.with_name("rabbitmq-env").exists()


def _first_errors(node: Process) -> str:
    """What the node complained of first; the end of its log is only how Erlang fell over."""
    lines = node.log_tail(1000).splitlines()
    first = next((i for i, line in enumerate(lines) if "[error]" in line), max(0, len(lines) - 12))
    return "\n".join(lines[first : first + 12])


def _definitions(passwords: Mapping[str, str]) -> dict[str, object]:
    """Vhost and users; `passwords` by user."""
    tags: dict[str, str] = {OPERATOR: "administrator"}
    permissions: dict[str, tuple[str, str, str]] = {OPERATOR: (".*", ".*", ".*")}
    topics: dict[str, tuple[str, str]] = {}
    for user, rights in BROKER_RIGHTS.items():
        tags[user] = rights.tag
        permissions[user] = rights.permissions()
        topics[user] = rights.topic_permissions()
    return {
        "vhosts": [{"name": VHOST}],
        "users": [
            {
                "name": user,
                "password_hash": _hashed(password),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": tags[user],
            }
            for user, password in passwords.items()
        ],
        "permissions": [
            {"user": user, "vhost": VHOST, "configure": configure, "write": write, "read": read}
            for user, (configure, write, read) in permissions.items()
        ],
        "topic_permissions": [
            {"user": user, "vhost": VHOST, "exchange": EXCHANGE, "write": write, "read": read}
            for user, (write, read) in topics.items()
        ],
    }


def _hashed(password: str) -> str:
    salt = secrets.token_bytes(4)
    digest = hashlib.sha256(salt + password.encode()).digest()
    return base64.b64encode(salt + digest).decode()


def _write(path: Path, text: str, mode: int = 0o600) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
