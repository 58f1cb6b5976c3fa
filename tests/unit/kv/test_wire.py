"""How do a block's bytes cross a connection? Against a peer that says what a test tells it to."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import valkey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdtasks.kv import wire as wire_module
from pdtasks.kv.wire import BlockConnection, StoreError, UnexpectedValue
from tests.certificates import make_certificate

KEY = b"pd:kv:0123456789abcdef:0:6b"
GET = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(KEY), KEY)


def set_of(value: bytes) -> bytes:
    """What is said to store `value`."""
    head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(KEY), KEY, len(value))
    return head + value + b"\r\n$2\r\nEX\r\n$2\r\n60\r\n"


#: For calls that should succeed.
SOON = 10.0


@dataclass
class FakeConnection:
    """As valkey-py makes them, but to a peer in this process."""

    _sock: socket.socket | None
    connected: int = 0
    disconnected: bool = False

    def connect(self) -> None:
        self.connected += 1

    def disconnect(self) -> None:
        self.disconnected = True
        if self._sock is not None:
            self._sock.close()
            self._sock = None


@dataclass
class Line:
    """A connection and its peer, who acts in a thread of its own."""

    connection: BlockConnection
    made_by_valkey: FakeConnection
    ours: socket.socket
    peer: socket.socket
    heard: bytearray = field(default_factory=bytearray)
    _threads: list[threading.Thread] = field(default_factory=list)

    def then(self, act: Callable[[], None]) -> None:
        """Let the peer `act` while the test goes on, once it has done what it was told before."""
        before = self._threads[-1:]

        def quietly() -> None:
            for thread in before:  # a TLS connection is for one thread at a time
                thread.join()
            with contextlib.suppress(OSError):  # the other side has had enough
                act()

        self._threads.append(threading.Thread(target=quietly, daemon=True))
        self._threads[-1].start()

    def answer(self, *pieces: bytes, after: int = len(GET)) -> None:
        """The peer hears `after` bytes, then says `pieces`, each when the last one was taken."""

        def act() -> None:
            self.listen(after)
            for piece in pieces:
                self.peer.sendall(piece)
                while unread(self.ours):
                    time.sleep(0)

        self.then(act)

    def listen(self, count: int) -> None:
        """The peer hears `count` bytes more."""
        end = len(self.heard) + count
        while len(self.heard) < end:
            chunk = self.peer.recv(end - len(self.heard))
            if not chunk:
                return
            self.heard += chunk

    def get(self, *sizes: int, within: float = SOON) -> bytes | None:
        """The value that comes, as one piece."""
        parts = [memoryview(bytearray(size)) for size in sizes]
        if not self.connection.get(KEY, parts, time.monotonic() + within):
            return None
        return b"".join(parts)

    def put(self, *parts: bytes, within: float = SOON) -> None:
        views = [memoryview(part) for part in parts]
        self.connection.put(KEY, views, 60, time.monotonic() + within)

    def still_works(self) -> None:
        """The next answer belongs to the next question."""
        self.answer(b"$5\r\nright\r\n")
        assert self.get(5) == b"right"

    def close(self) -> None:
        self.connection.close()
        self.peer.close()
        for thread in self._threads:
            thread.join(SOON)
            assert not thread.is_alive()


def unread(sock: socket.socket) -> int:
    """Bytes that have arrived and were not taken."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4))[0])
    except (OSError, ValueError):  # closed
        return 0


def connected(ours: socket.socket, peer: socket.socket) -> Line:
    made = FakeConnection(ours)
    connection: Any = made
    return Line(BlockConnection(connection), made, ours, peer)


@contextlib.contextmanager
def a_line() -> Iterator[Line]:
    ours, peer = socket.socketpair()
    line = connected(ours, peer)
    try:
        yield line
    finally:
        line.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the client, of the server."""
    certificate = make_certificate(tmp_path_factory.mktemp("tls"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate.file, certificate.key)
    return ssl.create_default_context(cafile=str(certificate.file)), server


@contextlib.contextmanager
def a_tls_line(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[Line]:
    ours, peer = socket.socketpair()
    for sock in (ours, peer):
        sock.settimeout(SOON)
    accepted: list[ssl.SSLSocket] = []
    accept = threading.Thread(
        target=lambda: accepted.append(tls[1].wrap_socket(peer, server_side=True))
    )
    accept.start()
    wrapped = tls[0].wrap_socket(ours, server_hostname="localhost")
    accept.join()
    line = connected(wrapped, accepted[0])
    try:
        yield line
    finally:
        line.close()


@pytest.fixture(params=["plain", "tls"])
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    if request.param == "plain":
        with a_line() as line:
            yield line
    else:
        with a_tls_line(request.getfixturevalue("tls")) as line:
            yield line


@pytest.fixture
def plain() -> Iterator[Line]:
    with a_line() as line:
        yield line


def pieces_of(answer: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(set(cuts)), len(answer)]
    return [answer[a:b] for a, b in itertools.pairwise(places) if a < b]


# -- what is said and heard --------------------------------------------------------------------


def test_valkey_connects_before_the_first_word(plain: Line) -> None:
    assert plain.made_by_valkey.connected == 1
    assert plain.connection.usable


def test_set_is_said_as_the_protocol_wants_it(line: Line) -> None:
    name = b"$%d\r\n%b\r\n" % (len(KEY), KEY)
    said = b"*5\r\n$3\r\nSET\r\n" + name + b"$9\r\nheadvalue\r\n$2\r\nEX\r\n$2\r\n60\r\n"
    line.answer(b"+OK\r\n", after=len(said))

    line.put(b"head", b"value")

    assert bytes(line.heard) == said == set_of(b"headvalue")
    assert line.connection.usable


def test_get_is_said_as_the_protocol_wants_it_and_fills_every_part(line: Line) -> None:
    line.answer(b"$11\r\nhead-value!\r\n")

    assert line.get(5, 0, 6) == b"head-value!"
    assert bytes(line.heard) == GET


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_value_may_break_off_anywhere_and_go_on(plain: Line, cut: int) -> None:
    answer = b"$13\r\nhead,a\r\nvalue\r\n"
    plain.answer(answer[:cut], answer[cut:])

    assert plain.get(5, 8) == b"head,a\r\nvalue"


@settings(deadline=None, max_examples=60)
@given(value=st.binary(max_size=60), sizes=st.data(), in_bytes=st.booleans())
@example(value=b"\r\n" * 9, sizes=None, in_bytes=True)
def test_a_value_is_the_same_however_it_is_cut(
    value: bytes, sizes: st.DataObject | None, in_bytes: bool
) -> None:
    answer = b"$%d\r\n%b\r\n" % (len(value), value)
    first = sizes.draw(st.integers(0, len(value))) if sizes else 0
    cuts = list(range(len(answer)))
    if sizes and not in_bytes:
        cuts = sizes.draw(st.lists(st.integers(0, len(answer)), max_size=6))
    with a_line() as line:
        line.answer(*pieces_of(answer, cuts))

        assert line.get(first, len(value) - first) == value
        line.still_works()


@settings(deadline=None, max_examples=40)
@given(
    answer=st.sampled_from([b"$-1\r\n", b"_\r\n", b"-ERR no\r\n"]),
    cuts=st.lists(st.integers(0, 9), max_size=4),
    size=st.sampled_from([0, 1, 7, 1000, 10**6]),
)
def test_no_value_is_noticed_however_it_is_cut(answer: bytes, cuts: list[int], size: int) -> None:
    with a_line() as line:
        line.answer(*pieces_of(answer, [min(cut, len(answer)) for cut in cuts]))

        if answer.startswith(b"-"):
            with pytest.raises(StoreError, match="ERR"):
                line.get(3, size)
        else:
            assert line.get(3, size) is None
        line.still_works()


@pytest.mark.parametrize("miss", [b"$-1\r\n", b"_\r\n"], ids=["RESP2", "RESP3"])
def test_a_miss_is_no_error(line: Line, miss: bytes) -> None:
    line.answer(miss)

    assert line.get(32, 4096) is None
    line.still_works()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"-ERR unknown command 'GET', with args beginning with: 'secret'\r\n", "ERR"),
        (b"-NOPERM no permission\r\n", "NOPERM"),
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", "OOM"),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", "MOVED"),
        (b"-LOADING\r\n", "LOADING"),
        (b"-\r\n", ""),
    ],
)
def test_a_refusal_says_its_kind_and_keeps_the_connection(
    line: Line, answer: bytes, kind: str
) -> None:
    line.answer(answer)
    with pytest.raises(valkey.ResponseError) as got:
        line.get(32, 4096)
    assert str(got.value) == kind, "the rest may quote what was sent"

    line.answer(answer, after=len(set_of(b"value")))
    with pytest.raises(valkey.ResponseError) as put:
        line.put(b"value")
    assert str(put.value) == kind

    assert line.connection.usable
    line.still_works()


# -- what should not be there ------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 9, 11, 100, 5000])
def test_a_value_of_another_length_is_unexpected_and_ends_the_connection(
    line: Line, length: int
) -> None:
    line.answer(b"$%d\r\n%b\r\n" % (length, b"x" * length))

    with pytest.raises(UnexpectedValue, match=rf"^{length} bytes"):
        line.get(4, 6)

    assert not line.connection.usable
    assert line.made_by_valkey.disconnected


def test_a_value_that_does_not_end_where_it_should_is_refused(line: Line) -> None:
    line.answer(b"$10\r\n0123456789abcdef")

    with pytest.raises(valkey.InvalidResponse):
        line.get(4, 6)

    assert not line.connection.usable


@pytest.mark.parametrize(
    "answer",
    [b"*1\r\n$1\r\nx\r\n", b":1\r\n", b"+OK\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"\r\n"],
)
def test_another_answer_than_a_value_ends_the_connection(line: Line, answer: bytes) -> None:
    line.answer(answer)

    with pytest.raises(StoreError, match="not an answer"):
        line.get(4, 6)

    assert not line.connection.usable


@pytest.mark.parametrize("answer", [b":1\r\n", b"+QUEUED\r\n", b"+OKAY\r\n", b"x" * 5000])
def test_another_answer_to_set_than_ok_ends_the_connection(line: Line, answer: bytes) -> None:
    line.answer(answer, after=1)

    with pytest.raises(StoreError, match="not an answer"):
        line.put(b"value")

    assert not line.connection.usable


@settings(deadline=None, max_examples=60)
@given(answer=st.binary(min_size=1, max_size=200))
@example(answer=b"-\r\n")
@example(answer=b"-\xff\xff\r\n")
@example(answer=b"$\r\n")
@example(answer=b"$999\r\n\r\n")
def test_garbage_is_an_error_and_never_a_value(answer: bytes) -> None:
    with a_line() as line:

        def say_and_leave() -> None:
            line.listen(1)
            line.peer.sendall(answer)
            line.peer.shutdown(socket.SHUT_WR)

        line.then(say_and_leave)

        outcome: bytes | Exception | None
        try:
            outcome = line.get(500, 499)  # there cannot be as many bytes in it
        except (StoreError, UnexpectedValue) as exc:
            outcome = exc

        if outcome is None:
            assert answer.startswith((b"$-1\r\n", b"_\r\n"))
        else:
            assert isinstance(outcome, Exception)
            assert isinstance(outcome, valkey.ResponseError) == line.connection.usable


@pytest.mark.parametrize("said", [b"", b"$1", b"$100\r\n", b"$100\r\nhalf a val", b"_", b"-ERR"])
def test_a_peer_that_leaves_in_the_middle_is_an_error(line: Line, said: bytes) -> None:
    def say_and_leave() -> None:
        line.listen(len(GET))
        line.peer.sendall(said)
        line.peer.close()

    line.then(say_and_leave)

    with pytest.raises(valkey.ConnectionError):
        line.get(50, 50)

    assert not line.connection.usable
    assert line.made_by_valkey.disconnected


def test_a_peer_that_leaves_while_it_is_told_something_is_an_error(line: Line) -> None:
    def hear_and_leave() -> None:
        line.listen(1000)
        line.peer.close()

    line.then(hear_and_leave)

    with pytest.raises(valkey.ConnectionError):
        line.put(bytes(8 << 20))

    assert not line.connection.usable


# -- deadlines ---------------------------------------------------------------------------------


@contextlib.contextmanager
def late(line: Line, within: float) -> Iterator[None]:
    """The call ends with an error, not before its time and not much after it."""
    began = time.monotonic()
    with pytest.raises(valkey.TimeoutError):
        yield
    took = time.monotonic() - began
    assert within - 0.05 <= took < within + 1, f"{took:.2f} s instead of {within}"
    assert not line.connection.usable, "the answer may still come"
    assert line.made_by_valkey.disconnected


def trickle(line: Line, text: bytes) -> None:
    """The peer says `text` byte by byte, in more time than anybody has."""
    with contextlib.suppress(OSError):
        for place in range(len(text)):
            line.peer.sendall(text[place : place + 1])
            if line.made_by_valkey.disconnected:
                return
            time.sleep(0.02)


def test_a_peer_that_says_nothing_is_given_up(line: Line) -> None:
    with late(line, 0.2):
        line.get(4, 6, within=0.2)


def test_a_peer_that_says_nothing_to_set_is_given_up(line: Line) -> None:
    with late(line, 0.2):
        line.put(b"value", within=0.2)


@pytest.mark.parametrize("header", [b"$1000\r\n", b""], ids=["the value", "the beginning"])
def test_a_peer_that_trickles_a_value_is_given_up(line: Line, header: bytes) -> None:
    def act() -> None:
        line.listen(len(GET))
        line.peer.sendall(header)
        trickle(line, b"$" + b"1" * 999 if not header else b"v" * 1000)

    line.then(act)

    with late(line, 0.3):
        line.get(500, 500, within=0.3)


def test_a_peer_that_trickles_an_error_is_given_up(line: Line) -> None:
    line.then(lambda: trickle(line, b"-ERR " + b"x" * 1000))

    with late(line, 0.3):
        line.get(500, 500, within=0.3)


def test_a_peer_that_does_not_read_is_given_up(line: Line) -> None:
    with late(line, 0.3):
        line.put(bytes(16 << 20), within=0.3)


def test_a_peer_that_reads_too_slowly_is_given_up(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Within one call Linux keeps no deadline for a unix socket: it is kept between two.
    monkeypatch.setattr(wire_module, "_SENT_AT_ONCE", 1 << 20)

    def act() -> None:
        while not line.made_by_valkey.disconnected:
            line.listen(50_000)
            time.sleep(0.02)

    line.then(act)

    with late(line, 0.3):
        line.put(bytes(16 << 20), within=0.3)


def test_what_is_late_before_it_begins_is_given_up(line: Line) -> None:
    with late(line, 0.0):
        line.get(4, 6, within=-1.0)


def test_the_deadline_of_one_call_is_not_the_next_ones(line: Line) -> None:
    line.answer(b"$4\r\nfast\r\n")
    assert line.get(4, within=0.2) == b"fast"

    def act() -> None:
        line.listen(len(GET))
        time.sleep(0.3)
        line.peer.sendall(b"$4\r\nslow\r\n")

    line.then(act)
    assert line.get(4) == b"slow"


# -- large values ------------------------------------------------------------------------------

MIB = bytes(range(256)) * 4096


def test_a_slow_reader_with_small_buffers_gets_every_byte(line: Line) -> None:
    # Given buffers that take little at a time
    line.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    parts = [b"head", MIB, b"middle", MIB, b"end"]
    said = set_of(b"".join(parts))

    def act() -> None:
        for size in itertools.cycle([1, 7, 4095, 60_000]):
            if len(line.heard) == len(said):
                break
            line.listen(min(size, len(said) - len(line.heard)))
        line.peer.sendall(b"+OK\r\n")

    line.then(act)
    line.put(*parts)

    assert bytes(line.heard) == said


def test_a_large_value_arrives_whole_through_small_buffers(line: Line) -> None:
    line.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def act() -> None:
        line.listen(len(GET))
        line.peer.sendall(b"$%d\r\n%b\r\n" % (len(MIB), MIB))

    line.then(act)

    assert line.get(32, len(MIB) - 32) == MIB
    line.still_works()


def test_many_values_follow_each_other_on_one_connection(line: Line) -> None:
    for number in range(50):
        line.answer(b"$6\r\n%06d\r\n" % number)
        assert line.get(2, 4) == b"%06d" % number


def test_a_closed_connection_is_not_usable(plain: Line) -> None:
    plain.connection.close()
    plain.connection.close()

    assert not plain.connection.usable
    assert plain.made_by_valkey.disconnected
