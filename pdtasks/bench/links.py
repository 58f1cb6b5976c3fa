"""Which ways does a KV block take to another process, and how does one connection go each?

A link is one connection with buffers of its own, for one thread.  Every link moves the same bytes,
a block's header and its payload, between memory that was there before and the other process.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import valkey
from valkey._parsers import Encoder, _RESP2Parser
from valkey.connection import PythonRespSerializer, parse_url

from pdtasks.bench import peer
from pdtasks.kv.codec import HEADER_BYTES, check, seal
from pdtasks.kv.store import BlockStore

#: Seconds after which something is broken, not slow.
TIMEOUT_S = 60.0
_TTL_S = 600
_FINGERPRINT = "00112233aabbccdd"


class Link(Protocol):
    """One connection."""

    def put(self, key: str) -> None:
        """Hand the value over."""

    def get(self, key: str) -> None:
        """Take it back. Raises an error when it is not there or has another length."""

    def close(self) -> None:
        """Close the connection."""


@dataclass(frozen=True)
class Ends:
    """Where the other processes listen."""

    unix_url: str  #: of a Valkey server
    tcp_url: str  #: of a Valkey server with the same settings
    peer_path: Path
    peer_port: int


#: Opens a link for payloads of so many bytes.
OpenLink = Callable[[Ends, int], Link]


def filled(size: int) -> memoryview:
    """Memory with something in it: pages of nothing but zeros are one page to the kernel."""
    pattern = os.urandom(min(size, 1 << 20))
    return memoryview(bytearray((pattern * (size // len(pattern) + 1))[:size]))


class _Pdtasks:
    """What `kv/transfer.py` does for each block."""

    def __init__(self, url: str, size: int) -> None:
        self._store = BlockStore([url], ttl_s=_TTL_S, timeout_s=TIMEOUT_S)
        self._payload = filled(size)
        self._header = memoryview(bytearray(HEADER_BYTES))

    def put(self, key: str) -> None:
        header = seal(key, self._payload, _FINGERPRINT)
        self._store.put(key, [memoryview(header), self._payload])

    def get(self, key: str) -> None:
        if not self._store.get(key, [self._header, self._payload]):
            raise KeyError(key)
        check(self._header, key, self._payload, _FINGERPRINT)

    def close(self) -> None:
        self._store.close()


class _Socket:
    """The limit: the same bytes, and nobody who keeps them."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        self._sock = sock
        self._value = filled(HEADER_BYTES + size)
        self._put = memoryview(peer.REQUEST.pack(peer.PUT, len(self._value)))
        self._get = memoryview(peer.REQUEST.pack(peer.GET, len(self._value)))
        self._ok = memoryview(bytearray(len(peer.OK)))
        self._expected = peer.get_line(len(self._value))
        self._line = memoryview(bytearray(len(self._expected)))

    def put(self, key: str) -> None:
        peer.send_all(self._sock, [self._put, self._value])
        peer.receive_all(self._sock, [self._ok])

    def get(self, key: str) -> None:
        peer.send_all(self._sock, [self._get])
        peer.receive_all(self._sock, [self._line, self._value])
        if self._line != self._expected:
            raise ValueError("the peer speaks of another length")

    def close(self) -> None:
        self._sock.close()


class _ValkeyPy:
    """valkey-py as anybody would use it; its answers come in memory that it allocates."""

    def __init__(self, url: str, size: int, **options: Any) -> None:
        pool = valkey.ConnectionPool.from_url(url, socket_timeout=TIMEOUT_S, **options)
        self._client = valkey.Valkey.from_pool(pool)
        self._value = filled(HEADER_BYTES + size)

    def put(self, key: str) -> None:
        self._client.set(key, self._value, ex=_TTL_S)

    def get(self, key: str) -> None:
        value = self._client.get(key)
        if not isinstance(value, bytes) or len(value) != len(self._value):
            raise ValueError(f"not the value of {key}")

    def close(self) -> None:
        self._client.close()


class _Glide:
    """GLIDE's core does the work; `get` copies into a buffer of ours, its fastest way."""

    def __init__(self, url: str, size: int) -> None:
        import glide_sync

        parts = parse_url(url)
        credentials = glide_sync.ServerCredentials(
            password=parts.get("password"), username=parts.get("username")
        )
        self._client = glide_sync.GlideClient.create(
            glide_sync.GlideClientConfiguration(
                [glide_sync.NodeAddress(parts["host"], parts["port"])],
                credentials=credentials,
                request_timeout=int(TIMEOUT_S * 1000),
            )
        )
        self._value = filled(HEADER_BYTES + size)
        self._expiry = glide_sync.ExpirySet(glide_sync.ExpiryType.SEC, _TTL_S)

    def put(self, key: str) -> None:
        self._client.set(key, self._value, expiry=self._expiry)

    def get(self, key: str) -> None:
        if self._client.get(key, buffer=self._value) != b"%d" % len(self._value):
            raise ValueError(f"not the value of {key}")

    def close(self) -> None:
        self._client.close()


def _tcp_socket(ends: Ends, size: int) -> Link:
    sock = socket.create_connection(("127.0.0.1", ends.peer_port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _Socket(sock, size)


def _unix_socket(ends: Ends, size: int) -> Link:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(ends.peer_path))
    return _Socket(sock, size)


# valkey-py takes libvalkey for both directions where it is installed, unless told otherwise.
_pure_python = functools.partial(
    _ValkeyPy,
    parser_class=_RESP2Parser,
    command_packer=PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode),
)

#: All that is compared, by the names of the report. The peer's sockets are the limit.
LINKS: Final[dict[str, OpenLink]] = {
    "pdtasks-tcp": lambda ends, size: _Pdtasks(ends.tcp_url, size),
    "pdtasks-unix": lambda ends, size: _Pdtasks(ends.unix_url, size),
    "socket-tcp": _tcp_socket,
    "socket-unix": _unix_socket,
    "valkey-py": lambda ends, size: _pure_python(ends.tcp_url, size),
    "valkey-py-libvalkey": lambda ends, size: _ValkeyPy(ends.tcp_url, size),
    "valkey-glide-sync": lambda ends, size: _Glide(ends.tcp_url, size),
}
