"""What answers the plain sockets that Valkey is compared with?

A process that only moves bytes: what it can do is what the kernel lets two processes do on this
host.  It speaks the pattern of SET and GET and nothing else::

    put     request, value   →  +OK
    get     request          →  $<bytes>, value

It is started by `Peer`, says where it listens on its standard output, and ends with its standard
input, so it outlives nobody.  Each connection has a thread: the kernel's calls, where all its time
goes, are made without the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pdtasks.kv.wire import rest_after

PUT, GET = b"P", b"G"
#: PUT or GET, and the value's length.
REQUEST = struct.Struct("<cQ")
OK = b"+OK\r\n"
_STOP_S = 5.0


def get_line(size: int) -> bytes:
    """What comes before a value."""
    return b"$%d\r\n" % size


class Peer:
    """The process, as its starter sees it."""

    def __init__(self, path: Path) -> None:
        """Args:
        path: of the unix socket that it makes.
        """
        self.path = path
        self.port = 0  #: on loopback
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the starter, which then stops it
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._stop()
            raise RuntimeError("the peer of the plain sockets did not start; it said why above")
        self.port = int(line)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self._process is not None
        try:
            self._process.communicate(timeout=_STOP_S)  # closes its standard input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def serve(path: str) -> None:
    """Answer on a unix socket at `path` and on a free TCP port until standard input ends."""
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    unix.listen(64)
    tcp = socket.create_server(("127.0.0.1", 0), backlog=64)
    for listening in (unix, tcp):
        _in_thread(_accept, listening)
    print(tcp.getsockname()[1], flush=True)  # noqa: T201 - the starter reads it
    sys.stdin.read()


def _accept(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _in_thread(_answer, connection)


def _answer(connection: socket.socket) -> None:
    request, value = bytearray(REQUEST.size), bytearray()
    # A client that has what it wanted just goes.
    with connection, contextlib.suppress(ConnectionError):
        while connection.recv_into(request, 0, socket.MSG_WAITALL) == len(request):
            kind, size = REQUEST.unpack(request)
            if len(value) != size:
                value = bytearray(size)
            if kind == PUT:
                receive_all(connection, [memoryview(value)])
                connection.sendall(OK)
            else:
                send_all(connection, [memoryview(get_line(size)), memoryview(value)])


def send_all(sock: socket.socket, views: list[memoryview]) -> None:
    """Send all of `views`: one system call, unless a signal comes in between."""
    while views:
        views = rest_after(views, sock.sendmsg(views))


def receive_all(sock: socket.socket, views: list[memoryview]) -> None:
    """Fill `views`: one system call, unless a signal comes in between."""
    while views:
        count = sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        if count == 0:
            raise ConnectionResetError("the other end has gone")
        views = rest_after(views, count)


def _in_thread(work: Callable[[socket.socket], None], sock: socket.socket) -> None:
    threading.Thread(target=work, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    serve(sys.argv[1])
