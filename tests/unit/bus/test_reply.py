"""How do tokens get back? The parts without a bus; the rest is in tests/integration."""

from __future__ import annotations

import logging

import msgspec
import pytest

from pdtasks.bus.reply import _readable, is_reply_stream
from pdtasks.messages import WIRE_VERSION, StepReply


@pytest.mark.parametrize(
    ("reply_to", "ours"),
    [
        ("pd:reply:0123", True),
        (None, False),
        ("", False),
        ("0f9b1f5e-3a54-3c53-9d0c-5d7c6a0c0a11", False),  # Celery's own, for its rpc backend
        ("pd:worker:prefill1@h", False),
    ],
)
def test_only_our_streams_are_written_to(reply_to: str | None, ours: bool) -> None:
    assert is_reply_stream(reply_to) is ours


def test_a_reply_of_another_release_is_dropped_and_the_others_are_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = StepReply(worker="w", stage="decode", engine="e", positions=(1,))
    foreign = msgspec.structs.replace(good, version=WIRE_VERSION + 1)

    with caplog.at_level(logging.ERROR):
        read = list(_readable([good.to_wire(), b"\xc1", foreign.to_wire(), good.to_wire()]))

    assert read == [good, good]
    assert len(caplog.records) == 2
