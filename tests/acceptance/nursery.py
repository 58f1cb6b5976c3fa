"""Workers and engines within a moment: they fork off a process that has imported vLLM.

That import takes 12 s of a core, and a worker needs it twice: in its own process and in its
engine's.  Here one process imports everything, with the libraries that vLLM would have an engine's
process load first.  A child runs the command line that it would have been started with, and its own
`multiprocessing` forks as well: from a copy of the first process that was made before the child had
any thread.  A child is its starter's child for the kernel too.

What is not as after an `exec`: /proc shows the first process's environment, and what reads its
environment when it is imported has read another one: a rank of a tensor-parallel group, for one, is
bound to no core, for OpenMP is there already.  The stack's first API and Flower are
therefore started as ever, and so are all of `pdtasks demo`, workers and engines too.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import util
from pathlib import Path
from typing import IO, Any, NamedTuple

import setproctitle

from pdtasks import collecting
from pdtasks.cluster.process import Child, Process

ROOT = Path(__file__).parents[2]
_READY = b"ready"
_ORDER_BYTES = 1 << 17
_PARENT_S = 10.0
_START_S = 120.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
#: A descriptor number beyond those that a child is given.
_HIGH = 200
_IMPORTED = (
    *("celery.bin.celery", "celery.bin.worker", "celery.concurrency.thread"),
    *("vllm.entrypoints.launchers.app", "vllm.entrypoints.launchers.api_server.app_state"),
    *("vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.engine.core_client"),
    *("vllm.v1.executor.uniproc_executor", "vllm.model_executor.models.llama"),
    "vllm.v1.structured_output.backend_xgrammar",
    *("pdtasks.decode", "pdtasks.prefill", "pdtasks.worker.celery_worker", "pdtasks.kv.connector"),
    *("api.flags", "api.main"),
)
_IMPORTED_ON_CPU = ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn")


class Nursery:
    """Where a process has its children forked."""

    def __init__(self, orders: socket.socket) -> None:
        self._orders = orders
        self._one_at_a_time = threading.Lock()
        self._is_ready = False

    def wait(self) -> None:
        """Return when all is imported, and a child starts within a moment."""
        with self._one_at_a_time:
            self._wait()

    def _wait(self) -> None:
        if not self._is_ready:
            assert self._orders.recv(32) == _READY, "the nursery has not come up"
            self._is_ready = True

    def fork(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str | Path,
        files: Mapping[int, int],
        *,
        session: bool = True,
        dies_with_us: bool = False,
    ) -> int:
        """Start `argv`, a Python's command line; returns the pid of a child of this process.

        Args:
            files: which of our descriptors it has under which number.
            session: it leads one of its own.
            dies_with_us: it gets SIGTERM when this process ends.
        """
        order = {
            "argv": list(argv),
            "env": dict(env),
            "cwd": str(cwd),
            "files": list(files),
            "session": session,
            "dies_with_us": dies_with_us,
            "parent": os.getpid(),
        }
        with self._one_at_a_time:
            self._wait()
            with _adopting():
                socket.send_fds(self._orders, [json.dumps(order).encode()], list(files.values()))
                answer = self._orders.recv(32)
        assert answer, "the nursery has ended"
        return int(answer)

    def start(
        self, argv: Sequence[str], env: Mapping[str, str], log: IO[Any], **options: Any
    ) -> Forked:
        """Start `argv` with its output in `log`.

        Args:
            options: `cwd`, `stdin`.
        """
        with Path(os.devnull).open() as nothing:
            stdin = options.get("stdin") or nothing
            files = {0: stdin.fileno(), 1: log.fileno(), 2: log.fileno()}
            return Forked(self.fork(argv, env, options.get("cwd", str(Path.cwd())), files))


class Forked:
    """A child, with what tests use of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextmanager
def nursery(log: Path) -> Iterator[Nursery]:
    """One that is importing: the first child waits for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_START_S)
    with ours, theirs, log.open("w") as said:
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.nursery", str(theirs.fileno())],
            env=_environment(),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=ROOT,
            start_new_session=True,
        )
        theirs.close()
        try:
            yield Nursery(ours)
        finally:
            ours.close()
            program.wait(timeout=60)


def _environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        # Read when something is imported; what workers and engines of the tests have.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",
        # Threads do not survive a fork.  An engine computes with one anyway (`started_stack`); two
        # of a forked process wait for each other four times as long as those of another.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return env | _libraries()


def _libraries() -> dict[str, str]:
    """What vLLM has an engine's process load first."""
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    libraries = map(str, (Path(torch.origin).parent / "lib").glob("libgomp*.so*"))
    return {"LD_PRELOAD": ":".join(libraries)}


@contextmanager
def _adopting() -> Iterator[None]:
    """What loses its parent below this process becomes a child of this process."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# -- the program -----------------------------------------------------------------------------------


class _Order(NamedTuple):
    argv: list[str]
    env: dict[str, str]
    cwd: str
    files: list[int]
    session: bool
    dies_with_us: bool
    parent: int


def _serve(orders: socket.socket) -> tuple[_Order, list[int]]:
    """Returns in each child, with what it is to be and the descriptors it was sent."""
    orders.send(_READY)
    while True:
        try:
            message, files, _, _ = socket.recv_fds(orders, _ORDER_BYTES, 16)
        except ConnectionResetError:  # who has ended without an order
            os._exit(0)
        if not message:
            os._exit(0)
        order = _Order(**json.loads(message))
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                for number in (told, tell):
                    os.close(number)
                orders.close()
                _wait_for(order.parent)
                return order, files
            os.write(tell, str(child).encode())
            os._exit(0)
        os.close(tell)
        answer = os.read(told, 32)
        os.close(told)
        # From here on its parent is whoever adopts at the moment.
        os.waitpid(between, 0)
        for number in files:
            os.close(number)
        orders.send(answer)


def _wait_for(parent: int) -> None:
    until = time.monotonic() + _PARENT_S
    while os.getppid() != parent:
        if time.monotonic() > until:
            os._exit(1)
        time.sleep(0.001)


def _be(order: _Order, files: list[int]) -> None:
    """Run the command line of `order` in this process; ends as Python would."""
    if order.session:
        os.setsid()
    if order.dies_with_us:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != order.parent:
            os._exit(1)
    high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _HIGH) for number in files]
    for number in files:
        os.close(number)
    for number, wanted in zip(high, order.files, strict=True):
        os.dup2(number, wanted)
        os.close(number)
    os.environ.clear()
    os.environ.update(_set_by_imports | order.env)
    os.chdir(order.cwd)
    tempfile.tempdir = None
    if threads := order.env.get("OMP_NUM_THREADS"):
        import_module("torch").set_num_threads(int(threads))
    for folder in reversed(order.env.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    sys.modules.pop("sitecustomize", None)
    with suppress(ModuleNotFoundError):
        import_module("sitecustomize")
    setproctitle.setproctitle(" ".join(order.argv))
    _run(order.argv)


def _run(argv: list[str]) -> None:
    _, *words = argv
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):
        del words[0]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    _nurse()
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _nurse() -> None:
    """From now on this process's own children fork off a copy of it as it is now."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    copy = os.fork()
    if copy == 0:
        ours.close()
        _be(*_serve(theirs))
        raise SystemExit
    theirs.close()
    own = Nursery(ours)

    def end_the_copy() -> None:
        ours.close()
        os.waitpid(copy, 0)

    atexit.register(end_the_copy)
    spawn_child, spawn = vars(util)["spawnv_passfds"], vars(Process)["_spawn"]

    def fork_child(path: Any, args: Sequence[str | bytes], passed: Sequence[int]) -> int:
        words = [os.fsdecode(word) for word in args]
        if "spawn_main" not in " ".join(words):
            pid: int = spawn_child(path, args, passed)
            return pid
        files = {number: number for number in (0, 1, 2, *passed)}
        return own.fork(words, os.environ, str(Path.cwd()), files, session=False)

    def fork_part(self: Process, log: int) -> Child:
        argv, env, cwd = (vars(self)[name] for name in ("_argv", "_env", "_cwd"))
        if "worker" not in argv and self.name != "api2":
            child: Child = spawn(self, log)
            return child
        with Path(os.devnull).open() as nothing:
            files = {0: nothing.fileno(), 1: log, 2: log}
            return _Part(own.fork(argv, env, cwd, files, dies_with_us=True))

    vars(util)["spawnv_passfds"] = fork_child
    Process._spawn = fork_part  # type: ignore[method-assign]


class _Part:
    """A child of the supervisor."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


_set_by_imports: dict[str, str] = {}


def _main(orders: socket.socket) -> None:
    # It looks for its place in memory the first time, beside the environment as it was.
    setproctitle.getproctitle()
    before = dict(os.environ)
    with collecting.rarely():
        for name in _IMPORTED:
            import_module(name)
        if import_module("vllm.platforms").current_platform.is_cpu():
            for name in _IMPORTED_ON_CPU:
                import_module(name)
    _set_by_imports.update({k: v for k, v in os.environ.items() if before.get(k) != v})
    assert threading.active_count() == 1
    assert len(os.listdir("/proc/self/task")) == 1
    _be(*_serve(orders))


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
