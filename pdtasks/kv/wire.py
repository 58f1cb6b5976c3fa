"""How do a block's bytes cross a connection without being copied in Python?

valkey-py makes the connection: address, password, TLS, handshake.  After that SET and GET are
spoken here, in a few bytes of RESP (https://valkey.io/topics/protocol/) around the block itself,
which the kernel reads from and writes to the caller's buffer.
"""

from __future__ import annotations

import math
import socket
import ssl
import struct
import time
from collections.abc import Sequence

import valkey
from valkey.connection import AbstractConnection

#: What a connection raises when a server cannot be reached, refuses, breaks off or is late.
StoreError = valkey.ValkeyError

#: Longest line that a server answers with; only errors come near it.
_MAX_LINE = 4096
#: Most bytes of one call: to a peer that reads slowly, Linux limits the time of every 64 KiB of it
#: anew when the socket is a unix one, and nobody can look at the deadline meanwhile.
_SENT_AT_ONCE = 16 << 20
#: Bytes under way on a unix socket.
_UNIX_BUFFER = 1 << 20
#: Seconds by which a deadline may be missed, for two system calls less.
_LIMIT_TOLERANCE_S = 0.05
_OK = b"+OK\r\n"
_NULL = (b"$-1\r\n", b"_\r\n")  # RESP2, RESP3


class UnexpectedValue(Exception):
    """What lies under a block's name has not a block's length."""


class BlockConnection:
    """One connection that speaks SET and GET. For one thread at a time.

    After any error but a refusal the connection is closed: nobody knows what would come next.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        """Take over `connection`, which valkey-py has made; it is connected when it is not yet.

        Raises StoreError.
        """
        connection.connect()
        sock = connection._sock  # noqa: SLF001 - the bulk bytes go around valkey-py on purpose
        assert sock is not None
        self._connection = connection
        self.usable = True  #: False once it is closed
        self._socket = _TlsSocket(sock) if isinstance(sock, ssl.SSLSocket) else _PlainSocket(sock)

    def put(self, key: bytes, parts: Sequence[memoryview], ttl_s: int, deadline: float) -> None:
        """Store the concatenation of `parts` (bytes, contiguous) under `key` for `ttl_s` seconds.

        Raises StoreError, also when `deadline` (`time.monotonic()`) passes.
        """
        size = sum(map(len, parts))
        before = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, size)
        ttl = b"%d" % ttl_s
        after = b"\r\n$2\r\nEX\r\n$%d\r\n%b\r\n" % (len(ttl), ttl)
        try:
            self._socket.arm(deadline)
            self._socket.send([memoryview(before), *parts, memoryview(after)])
            line = self._line(b"")
        except OSError as exc:
            raise self._lost(exc) from exc
        if line != _OK:
            self._refused(line)

    def get(self, key: bytes, parts: Sequence[memoryview], deadline: float) -> bool:
        """Receive the value of `key` into `parts`, which it has to fill exactly.

        Returns False when there is none; `parts` then hold nothing of use.

        Raises StoreError, also when `deadline` passes; UnexpectedValue when the value has another
        length.
        """
        size = sum(map(len, parts))
        expected = b"$%d\r\n" % size
        line, end = bytearray(len(expected)), bytearray(2)
        views = [memoryview(line), *parts, memoryview(end)]
        try:
            self._socket.arm(deadline)
            self._socket.send([memoryview(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))])
            received = 0
            while received < len(line):
                received += self._socket.receive_some(rest_after(views, received))
                if not expected.startswith(line[:received]):
                    # Another answer; what came beyond `line` lies at the beginning of the parts.
                    answer = self._line(b"".join(_first(views, min(received, _MAX_LINE))))
                    if answer in _NULL:
                        return False
                    return self._refused(answer)
            self._socket.receive(rest_after(views, received))
        except OSError as exc:
            raise self._lost(exc) from exc
        if end != b"\r\n":
            self.close()
            raise valkey.InvalidResponse("a value did not end where it should")
        return True

    def close(self) -> None:
        """Close the connection."""
        self.usable = False
        self._connection.disconnect()

    def _line(self, begun: bytes) -> bytes:
        """The rest of the line that begins with `begun`."""
        line = bytearray(begun)
        while not line.endswith(b"\r\n") and len(line) < _MAX_LINE:
            chunk = bytearray(_MAX_LINE - len(line))
            count = self._socket.receive_some([memoryview(chunk)])
            line += chunk[:count]
        return bytes(line)

    def _refused(self, line: bytes) -> bool:
        """Raise what an answer that is no value means."""
        if line.startswith(b"-") and line.endswith(b"\r\n"):
            # Only the kind: some errors quote the command.
            kind = line[1:].partition(b" ")[0].strip()
            raise valkey.ResponseError(kind.decode("ascii", "replace"))
        self.close()
        if line.startswith(b"$"):
            length = line[1:].split(b"\r", 1)[0].decode("ascii", "replace")
            raise UnexpectedValue(f"{length} bytes under the name of a block")
        raise valkey.InvalidResponse("not an answer of Valkey's")

    def _lost(self, error: OSError) -> valkey.ValkeyError:
        self.close()
        if isinstance(error, BlockingIOError | TimeoutError):
            return valkey.TimeoutError("no answer before the deadline")
        return valkey.ConnectionError(f"the connection broke: {type(error).__name__}")


class _Deadline:
    """Until when everything has to be done that the next system calls do."""

    def __init__(self) -> None:
        self._deadline = 0.0

    def arm(self, deadline: float) -> None:
        self._deadline = deadline

    def _left(self) -> float:
        """Seconds, never 0, which sockets take for no limit. Raises TimeoutError."""
        left = self._deadline - time.monotonic()
        if left < 1e-3:
            raise TimeoutError
        return left


class _PlainSocket(_Deadline):
    """A blocking socket: one system call moves a whole block, and the kernel limits its time."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        sock.settimeout(None)
        if sock.family == socket.AF_UNIX:
            # Linux's default lets sender and receiver wake each other every 200 KiB; of TCP's
            # buffers the kernel takes better care itself.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
        self._sock = sock
        self._limited_to = math.inf

    def _limit(self) -> None:
        # Before each call, as the limit is one call's: a peer that trickles makes many.
        left = self._left()
        if abs(left - self._limited_to) < _LIMIT_TOLERANCE_S:
            return
        self._limited_to = left
        timeval = struct.pack("ll", int(left), int(left % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, timeval)

    def send(self, views: Sequence[memoryview]) -> None:
        sent, total = 0, sum(map(len, views))
        while sent < total:
            self._limit()
            sent += self._sock.sendmsg(_first(rest_after(views, sent), _SENT_AT_ONCE))

    def receive_some(self, views: Sequence[memoryview]) -> int:
        self._limit()
        return _some(self._sock.recvmsg_into(views)[0])

    def receive(self, views: Sequence[memoryview]) -> None:
        received, total = 0, sum(map(len, views))
        while received < total:
            self._limit()
            rest = rest_after(views, received)
            received += _some(self._sock.recvmsg_into(rest, 0, socket.MSG_WAITALL)[0])


class _TlsSocket(_Deadline):
    """A TLS socket: no scatter and gather, records of 16 KiB."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__()
        self._sock = sock

    def send(self, views: Sequence[memoryview]) -> None:
        for view in views:
            self._sock.settimeout(self._left())
            self._sock.sendall(view)

    def receive_some(self, views: Sequence[memoryview]) -> int:
        self._sock.settimeout(self._left())
        return _some(self._sock.recv_into(views[0]))

    def receive(self, views: Sequence[memoryview]) -> None:
        for view in views:
            done = 0
            while done < len(view):
                done += self.receive_some([view[done:]])


def _some(count: int) -> int:
    if count == 0:
        raise ConnectionResetError
    return count


def _first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes of `views`."""
    first = []
    for view in views:
        first.append(view[:count])
        count -= len(first[-1])
    return first


def rest_after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """`views` without their first `count` bytes."""
    rest = []
    for view in views:
        if count < len(view):
            rest.append(view[count:])
        count = max(0, count - len(view))
    return rest
