"""TLS before a server that cannot: the embedded Valkey is built without."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from pathlib import Path
from typing import Self

from tests.certificates import Certificate


class TlsFront:
    """Listens on a port of its own, `port`, until it is left."""

    def __init__(self, certificate: Certificate, behind: tuple[str, int] | Path) -> None:
        """`behind`: host and port, or a unix socket."""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate.file, certificate.key)
        self._behind = behind
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                sock, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(5)
            with (
                self._context.wrap_socket(sock, server_side=True) as outside,
                self._connect() as inside,
            ):
                self._relay(outside, inside)

    def _connect(self) -> socket.socket:
        if not isinstance(self._behind, Path):
            return socket.create_connection(self._behind)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._behind))
        return sock

    def _relay(self, outside: ssl.SSLSocket, inside: socket.socket) -> None:
        while not self._closed.is_set():
            ready: list[socket.socket] = [outside] if outside.pending() else []
            ready = ready or select.select([outside, inside], [], [], 0.05)[0]
            for source in ready:
                data = source.recv(1 << 16)
                if not data:
                    return
                (inside if source is outside else outside).sendall(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()
