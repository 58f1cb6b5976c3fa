"""Is every job of ours taken, and nothing else?"""

from __future__ import annotations

import zlib
from typing import Any

import kombu
import msgspec
import pytest
from kombu.serialization import dumps, loads

from pdtasks.app import app
from pdtasks.messages import DecodeJob, PrefillJob, StageReport
from pdtasks.pipeline import _first_stage, next_stage, same_stage
from pdtasks.worker.intake import read_address, why_refused

_TIMES: dict[str, Any] = {"submitted_at": 1.0, "deadline": 2.0}
_PREFILL = PrefillJob(request_id="r", engine="v", model="m", request=b"\xff", **_TIMES)
_DECODE = DecodeJob(
    request_id="r",
    engine="v",
    model=None,
    request=b"\xff",
    output_token_ids=(1,),
    handle=None,
    prefill=StageReport(
        stage="prefill", worker="w", queue_s=0.1, seconds=0.2, prompt_tokens=4, output_tokens=1
    ),
    detokenise=False,
    prefilled_at=1.5,
    first_token_at=1.4,
    **_TIMES,
)
_STEP = {
    "task": "pdtasks.decode",
    "options": {"task_id": "r", "queue": "decode", "reply_to": None, "ignore_result": False},
}


def sent_by(publish: Any, monkeypatch: pytest.MonkeyPatch) -> kombu.Message:
    """The message that a worker gets, without RabbitMQ."""
    found: list[kombu.Message] = []

    def take(_producer: Any, _name: str, message: Any, **_: Any) -> None:
        content_type, encoding, body = dumps(message.body, serializer="msgpack")
        # AMQP has no tuples.
        headers = msgspec.json.decode(msgspec.json.encode(message.headers))
        found.append(
            kombu.Message(
                body=body, content_type=content_type, content_encoding=encoding, headers=headers
            )
        )

    monkeypatch.setattr(app.amqp, "send_task_message", take)
    monkeypatch.setattr("pdtasks.pipeline.ensure_declared", lambda *_: None)

    class Producer:
        channel = None

    publish(Producer())
    return found[0]


@pytest.mark.parametrize(
    "publish",
    [
        _first_stage(_PREFILL, "pd:reply:x"),
        _first_stage(_PREFILL, "pd:reply:x", {"traceparent": "00-1-2-01"}),
        _first_stage(_PREFILL, None),
        next_stage(_DECODE, [_STEP], parent_id="r.prefill", root_id="r.prefill"),
        same_stage(_DECODE, task_id="r", chain=[], parent_id=None, root_id="r", reply_to=None),
    ],
)
def test_what_we_send_is_taken(publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    message = sent_by(publish, monkeypatch)

    assert why_refused(message) is None
    address = read_address(message)
    assert address is not None
    assert address.task.startswith("pdtasks.")


@pytest.mark.parametrize(
    ("queue", "is_ours"),
    [("decode.qwen", True), ("decode.", False), ("prefill", False), ("decode.a/b", False)],
)
def test_the_next_stage_is_in_a_decode_queue_of_some_model(
    queue: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = sent_by(_first_stage(_PREFILL, "pd:reply:x"), monkeypatch)
    args, kwargs, embedded = loads(
        message.body, message.content_type, message.content_encoding, force=True
    )
    embedded["chain"][0]["options"]["queue"] = queue
    _, _, message.body = dumps([args, kwargs, embedded], serializer="msgpack")

    assert (why_refused(message) is None) == is_ours


@pytest.mark.parametrize("encoding", ["zlib", "bz2", "hex", "utf-8", None])
def test_a_body_that_would_unpack_is_not_touched(
    encoding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = sent_by(_first_stage(_PREFILL, None), monkeypatch)
    message.body, message.content_encoding = zlib.compress(bytes(100)), encoding

    assert why_refused(message) == "is not written in MessagePack"
    assert message._decoded_cache is None


@pytest.mark.parametrize(
    "headers", [{}, {"id": 7, "task": "t"}, {"id": "", "task": "t"}, {b"x": 1}]
)
def test_what_has_no_address_is_nobodys(headers: dict[Any, Any]) -> None:
    message = kombu.Message(body=b"", headers=headers)

    assert read_address(message) is None
    assert why_refused(message) == "is no task of ours"
