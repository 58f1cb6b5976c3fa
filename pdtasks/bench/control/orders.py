"""How is a client process told what to do? By lines of JSON on a socket, an order at a time."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from pdtasks.bench.control.load import Done, Order
from pdtasks.cluster.process import Process, StartFailed

_ANSWER_S = 120.0


def obey(path: str, measure: Callable[[Order], Done]) -> None:
    """A client's end: do what comes, until nobody orders any more."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("rb") as lines:
            for line in lines:
                done = measure(msgspec.json.decode(line, type=Order))
                connection.sendall(msgspec.json.encode(done) + b"\n")


class Client:
    """The other end: one client process."""

    def __init__(self, process: Process, path: Path) -> None:
        """`process` is told `path` and connects there."""
        self.process = process
        self._path = path

    def __enter__(self) -> Self:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._path))
            listener.listen(1)
            listener.settimeout(_ANSWER_S)
            self.process.start()
            try:
                self._connection, _ = listener.accept()
            except BaseException as exc:
                self.process.kill()
                if isinstance(exc, TimeoutError):
                    raise self.process.failure("does not connect") from None
                raise
        self._connection.settimeout(_ANSWER_S)
        self._lines = self._connection.makefile("rb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._connection.close()
        self.process.stop(10.0)

    def do(self, order: Order) -> Done:
        """Have it done. Raises StartFailed when the client fails."""
        try:
            self._connection.sendall(msgspec.json.encode(order) + b"\n")
            line = self._lines.readline()
        except OSError as exc:
            raise self._failure(type(exc).__name__) from None
        if not line:
            raise self._failure("it has ended")
        return msgspec.json.decode(line, type=Done)

    def _failure(self, why: str) -> StartFailed:
        return self.process.failure(f"does not answer ({why})")
