"""What crosses a process boundary?"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pdtasks.errors import IncompatibleWorker, InvalidRequest, NoWorker
from pdtasks.messages import (
    WIRE_VERSION,
    Answer,
    DecodeJob,
    Failure,
    Message,
    PrefillJob,
    StageReport,
    StepReply,
    TextRequest,
    WorkerStatus,
    read_message,
)

REPORT = StageReport(
    stage="prefill",
    worker="prefill1@h",
    queue_s=0.1,
    seconds=0.2,
    prompt_tokens=40,
    output_tokens=1,
    kv_blocks_written=3,
)

MESSAGES: list[Message] = [
    PrefillJob(
        request_id="r",
        engine="",
        model=None,
        text=TextRequest(
            messages=({"role": "user", "content": "a"},), sampling={"stop": ["x"], "seed": 3}
        ),
        submitted_at=1.0,
        deadline=2.0,
    ),
    PrefillJob(
        request_id="r", engine="v", model="m", request=b"\x00\xff", submitted_at=1.0, deadline=2.0
    ),
    DecodeJob(
        request_id="r",
        engine="vllm 0.32.0",
        model="m",
        request=b"\x00",
        output_token_ids=(1, 2),
        handle={"hashes": [b"\xff"]},
        prefill=REPORT,
        detokenise=True,
        submitted_at=1.0,
        prefilled_at=1.5,
        first_token_at=1.4,
        deadline=2.0,
    ),
    StepReply(
        worker="w",
        stage="decode",
        engine="vllm 0.32.0",
        outputs=b"\x00",
        positions=(1, 7),
        reports={"r": (REPORT,)},
        failures={"q": Failure(code="NoWorker", message="why")},
    ),
    WorkerStatus(name="w", role="decode", host="h", pid=1, state="ready"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert read_message(type(message), message.to_wire()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_of_another_wire_version_is_refused(message: Message) -> None:
    other = msgspec.structs.replace(message, version=WIRE_VERSION + 1)

    with pytest.raises(IncompatibleWorker, match=f"wire version {WIRE_VERSION + 1}"):
        read_message(type(message), other.to_wire())


@pytest.mark.parametrize("wire", [b"", b"\xc1", msgspec.msgpack.encode({"request_id": "r"})])
def test_what_is_no_message_is_refused_without_quoting_it(wire: bytes) -> None:
    with pytest.raises(IncompatibleWorker, match="unreadable PrefillJob") as caught:
        read_message(PrefillJob, wire)

    assert "request_id" not in str(caught.value)


def test_a_field_that_a_later_release_adds_is_no_hindrance() -> None:
    wire: dict[str, Any] = msgspec.msgpack.decode(MESSAGES[0].to_wire())

    read = read_message(PrefillJob, msgspec.msgpack.encode(wire | {"added_later": 1}))

    assert read == MESSAGES[0]


def test_a_failure_is_the_same_error_on_the_other_side() -> None:
    failure = Failure.of(NoWorker("start one"))

    error = msgspec.msgpack.decode(msgspec.msgpack.encode(failure), type=Failure).to_error()

    assert isinstance(error, NoWorker)
    assert str(error) == "start one"
    assert isinstance(Failure.of(InvalidRequest("no")).to_error(), InvalidRequest)


def test_an_answer_is_plain_enough_for_the_result_backend() -> None:
    answer = Answer(
        request_id="r",
        text="Paris",
        token_ids=(1, 2),
        finish_reason="stop",
        stop_reason=None,
        prompt_tokens=40,
        stages=(REPORT,),
        time_to_first_token_s=0.3,
    )

    plain = msgspec.to_builtins(answer)

    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(plain)), Answer) == answer
