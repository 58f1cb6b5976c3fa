"""Can a message stop its reader before anybody can refuse it?"""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from amqp import spec

from pdtasks.broker.frames import frame_handler

_DELIVER = struct.pack(">HH", *spec.Basic.Deliver)


class Reader:
    """Takes what the frames of one connection bring."""

    def __init__(self, error: Exception | None = None) -> None:
        self.taken: list[Any] = []
        self._error = error
        self._on_frame = frame_handler(SimpleNamespace(bytes_recv=0), self._take)

    def _take(self, _channel: int, _method: Any, _arguments: Any, content: Any) -> None:
        self.taken.append(content)
        if self._error is not None:
            raise self._error

    def read(self, properties: bytes, body: bytes = b"body") -> Any:
        self._on_frame((1, 1, _DELIVER))
        self._on_frame((2, 1, struct.pack(">HHQ", 60, 0, len(body)) + properties))
        if body:
            self._on_frame((3, 1, body))
        return self.taken[-1]


@pytest.mark.parametrize("body", [b"body", b""])
@pytest.mark.parametrize(
    "properties",
    [
        struct.pack(">HB2s", 0x8000, 2, b"\xff\xfe"),  # no UTF-8
        struct.pack(">HIB1scQ", 0x2000, 11, 1, b"t", b"T", 2**63),  # a time that is none
        struct.pack(">HIB1sc", 0x2000, 3, 1, b"t", b"?"),  # a kind of value that there is not
        b"",
    ],
)
def test_properties_that_cannot_be_read_are_none_and_the_next_message_is_read(
    properties: bytes, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader()

    assert reader.read(properties, body).properties == {}

    good = amqp.Message(content_type="text/plain", application_headers={"a": 1})
    read = reader.read(good._serialize_properties())
    assert read.properties == {"content_type": "text/plain", "application_headers": {"a": 1}}
    assert len(reader.taken) == 2
    assert len(caplog.records) == 1


def test_what_the_reader_raises_is_its_own() -> None:
    reader = Reader(KeyError("mine"))

    with pytest.raises(KeyError, match="mine"):
        reader.read(struct.pack(">H", 0), body=b"")
    assert len(reader.taken) == 1, "it is not given the message again"


def test_nothing_is_unpacked() -> None:
    packed = amqp.Message(application_headers={"compression": "application/x-gzip", "id": "r"})

    read = Reader().read(packed._serialize_properties())

    assert read.properties["application_headers"] == {"id": "r"}
