"""Is every frame handled that was read, with one call for many?"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from amqp import Connection, spec
from amqp.transport import TCPTransport

from pdtasks.broker.reading import frame_handler

_DELIVER = struct.pack(">HH", *spec.Basic.Deliver)


def frame(kind: int, content: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(content)) + content + b"\xce"


def message(body: bytes) -> bytes:
    """Three frames, as RabbitMQ sends them."""
    header = struct.pack(">HHQH", 60, 0, len(body), 0)
    return frame(1, _DELIVER) + frame(2, header) + frame(3, body)


class Wire:
    """A connection whose handshake is done, and RabbitMQ's end of it."""

    def __init__(self) -> None:
        self.far, near = socket.socketpair()
        self.taken: list[bytes] = []
        self.num_reads = 0
        self.connection = Connection()
        transport = TCPTransport("localhost")
        transport.sock, transport.connected = near, True
        transport._setup_transport()
        receive = transport._quick_recv

        def counted(size: int) -> bytes:
            self.num_reads += 1
            found: bytes = receive(size)
            return found

        transport._quick_recv = counted
        self.connection.transport = transport
        self.connection.on_inbound_frame = frame_handler(self.connection, self._take)

    def _take(self, _channel: int, _method: Any, _arguments: Any, content: Any) -> None:
        self.taken.append(content.body)
        if content.body == b"last":
            self.connection.collect()

    def take_all(self) -> None:
        with suppress(TimeoutError):
            while True:
                self.connection.drain_events(timeout=0)

    def close(self) -> None:
        self.far.close()
        self.connection.collect()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def test_all_messages_that_are_there_are_taken_by_one_read(wire: Wire) -> None:
    wire.far.sendall(message(b"one") + message(b"two") + message(b"three"))

    wire.connection.drain_events(timeout=0)

    assert wire.taken == [b"one", b"two", b"three"]
    assert wire.num_reads == 1


def test_a_message_is_taken_when_the_rest_of_it_comes(wire: Wire) -> None:
    whole = message(b"one") + message(b"x" * 300_000)  # more than is read at once
    for cut in (3, 20, len(message(b"one")) + 9):
        wire.far.sendall(whole[:cut])
        whole = whole[cut:]
        wire.take_all()

    assert wire.taken == [b"one"]
    wire.far.setblocking(False)
    while whole:
        whole = whole[wire.far.send(whole) :]
        wire.take_all()
    assert wire.taken == [b"one", b"x" * 300_000]


def test_who_waits_gets_what_comes_first_and_leaves_the_rest_to_the_socket(wire: Wire) -> None:
    wire.far.sendall(message(b"one") + message(b"two"))

    wire.connection.drain_events(timeout=5)

    assert wire.taken == [b"one"]
    assert select.select([wire.connection.sock], [], [], 0)[0], "who polls is told of the rest"
    wire.take_all()
    assert wire.taken == [b"one", b"two"]


def test_nothing_is_read_of_a_connection_that_a_message_has_closed(wire: Wire) -> None:
    wire.far.sendall(message(b"last") + message(b"after it"))

    wire.connection.drain_events(timeout=0)

    assert wire.taken == [b"last"]
