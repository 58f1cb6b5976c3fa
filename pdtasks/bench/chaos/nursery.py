"""Stub workers and API processes within a moment: one process imports everything, others fork off.

vLLM's import takes some seconds of a core, and a run of chaos starts many processes.  Run as a
program it obeys lines of JSON on its standard input::

    {"argv": ["…/python", "-m", "celery", …], "env": {…}, "cwd": "…", …}   ->   {"pid": 123}
    {"poll": 123}    ->   {"ended": false}
    {"wait": 123}    ->   {"status": -9}

Workers get a stub engine (`stub.py`, unless told otherwise) by the only seam there is: names that
`pdtasks.worker.service` has imported.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import setproctitle

import pdtasks
from pdtasks import collecting
from pdtasks.cluster.process import Child, Process, StartFailed

_SERVICE = "pdtasks.worker.service"
_PR_SET_PDEATHSIG = 1
_STOP_S = 10.0
_ANSWER_S = 120.0  # the first one comes after the imports


class Nursery:
    """The other end of the program. For one thread, which has to outlive its children."""

    def __init__(self, log: Path) -> None:
        self._log_file = log
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}
        root = str(Path(pdtasks.__file__).resolve().parent.parent)
        env |= {
            # Threads do not survive a fork.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")])),
        }
        with self._log_file.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pdtasks.bench.chaos.nursery", str(os.getpid())],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,  # what is not read yet can be waited for
                start_new_session=True,
            )
        self._is_ready = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def make(self, *args: Any, stub: str = "pdtasks.bench.chaos.stub", **options: Any) -> Process:
        """A `Process` that forks off here.

        Args:
        stub: the module with what stands for a worker's engine: `start_stub` and `NoText`.
        """
        return _Forked(self, stub, *args, **options)

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Have `order` obeyed. Raises StartFailed when nobody does."""
        assert self._process.stdin is not None
        try:
            while not self._is_ready:  # vLLM says a word or two before
                self._is_ready = self._read() == b"ready\n"
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._read())
        except BrokenPipeError:
            raise StartFailed(f"the nursery has ended: its log is {self._log_file}") from None
        return answer

    def _read(self) -> bytes:
        out = self._process.stdout
        assert out is not None
        answers, _, _ = select.select([out], [], [], _ANSWER_S)
        line = out.readline() if answers else b""
        if not line:
            raise StartFailed(f"the nursery does not answer: its log is {self._log_file}")
        return line


class _Forked(Process):
    def __init__(self, nursery: Nursery, stub: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._nursery = nursery
        self._stub = stub

    def _spawn(self, log: int) -> Child:
        order = {"argv": self._argv, "env": self._env, "log": str(self.log), "cwd": str(self._cwd)}
        order["stub"] = self._stub
        return _Orphan(self._nursery, int(self._nursery.ask(order)["pid"]))

    def _exited(self) -> bool:
        return bool(self._nursery.ask({"poll": self.pid})["ended"])


class _Orphan:
    """A child of the nursery."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = int(self._nursery.ask({"wait": self.pid})["status"])
        return self.returncode


# -- the program -----------------------------------------------------------------------------------


def _serve(parent: int) -> None:
    _die_with(parent)
    # It looks for its place in memory the first time, beside the environment as it was: in a child,
    # which has another one, it would look anywhere.
    setproctitle.getproctitle()
    with collecting.rarely():
        _import_everything()
    _say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        if "argv" in order:
            own = os.getpid()
            pid = os.fork()
            if pid == 0:
                os._exit(_be(order, own))
            _say(json.dumps({"pid": pid}))
        elif "poll" in order:
            how = os.WEXITED | os.WNOHANG | os.WNOWAIT
            ended = os.waitid(os.P_PID, order["poll"], how) is not None
            _say(json.dumps({"ended": ended}))
        else:
            _, status = os.waitpid(order["wait"], 0)
            _say(json.dumps({"status": os.waitstatus_to_exitcode(status)}))


def _import_everything() -> None:
    for name in (
        *("celery.bin.celery", "celery.bin.worker"),
        *("vllm.engine.arg_utils", "vllm.entrypoints.launchers.app"),
        "vllm.entrypoints.launchers.api_server.app_state",
        *("api.client", "api.jobs", "api.main"),
        *("pdtasks.decode", "pdtasks.prefill", "pdtasks.worker.celery_worker", _SERVICE),
    ):
        import_module(name)


def _use(stub: str) -> None:
    stubs = import_module(stub)
    vars(import_module(_SERVICE)).update(
        start_core=stubs.start_stub,
        TextFrontend=stubs.NoText,
        resolve_model=lambda *_: "stub",
    )


def _be(order: Mapping[str, Any], parent: int) -> int:
    """Become the process that `order` describes; returns its exit code."""
    os.setsid()
    _die_with(parent)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in enumerate((null, log, log)):
        os.dup2(target, number)
    faulthandler.enable(all_threads=False)  # a crash in native code says where in the log
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    _use(order["stub"])
    _, _, module, *arguments = order["argv"]  # python -m module …
    sys.argv = [module, *arguments]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:  # noqa: BLE001 - the interpreter would tell of it as well
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
    os._exit(0)  # Python would go once more through all that vLLM has made
