"""Does every decoder say in its own words that it cannot read something, whatever it is given?

Real messages, changed at random: one seed, so that what fails once fails again.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from vllm.v1.engine import FinishReason

from pdtasks.bus.progress import Progress
from pdtasks.engine.wire import decode_outputs, decode_request, encode_request
from pdtasks.errors import IncompatibleWorker, InvalidRequest
from pdtasks.messages import (
    Ask,
    DecodeJob,
    Failure,
    PrefillJob,
    StageReport,
    StepReply,
    TextRequest,
    WorkerStatus,
    read_message,
)
from tests.unit.factories import a_reply, a_request, an_output

SECRET = "canary-of-a-prompt"
_SEED = 16
_MUTATIONS = 400

_REPORT = StageReport(
    stage="prefill", worker="w", queue_s=0.1, seconds=0.2, prompt_tokens=40, output_tokens=1
)
_REQUEST = encode_request(a_request("r", stop=[SECRET], seed=3, logit_bias={5: 1.0}))
_JOB: dict[str, Any] = {
    "request_id": "r",
    "engine": "v",
    "model": "m",
    "submitted_at": 1.0,
    "deadline": 2.0,
}
_OUTPUTS = a_reply((0, an_output([7, 8])), (3, an_output([9], "q", FinishReason.STOP))).outputs
_MESSAGES = [
    PrefillJob(**_JOB, request=_REQUEST),
    PrefillJob(
        **_JOB,
        text=TextRequest(
            messages=({"role": "user", "content": [{"text": SECRET}]},), sampling={"stop": ["x"]}
        ),
    ),
    DecodeJob(
        **_JOB,
        request=_REQUEST,
        output_token_ids=(1, 2),
        handle={"hashes": [b"\xff"]},
        prefill=_REPORT,
        detokenise=True,
        prefilled_at=1.5,
        first_token_at=1.4,
    ),
    StepReply(
        worker="w",
        stage="decode",
        engine="v",
        outputs=_OUTPUTS,
        positions=(1, 7),
        reports={"r": (_REPORT,)},
        failures={"q": Failure(code="NoWorker", message=SECRET)},
        asks={"s": Ask(attempt=2**62)},
    ),
    WorkerStatus(name="w", role="decode", host="h", pid=1, state="ready", reason=SECRET),
    Progress(state="wanted", token_ids=(1, 2, 70_000)),
]


def _reader(kind: Any) -> Callable[[bytes], Any]:
    return lambda wire: read_message(kind, wire)


#: What is read, by whom, and the error that it may raise.
DECODERS: list[tuple[bytes, Callable[[bytes], Any], type[Exception]]] = [
    *((m.to_wire(), _reader(type(m)), IncompatibleWorker) for m in _MESSAGES),
    (_REQUEST, decode_request, InvalidRequest),
    (_OUTPUTS, decode_outputs, IncompatibleWorker),
]


def mutations(wire: bytes, rnd: random.Random) -> Iterator[bytes]:
    """Of `wire`: cut, filled, bytes changed, parts doubled; and bytes that are nothing at all."""
    for _ in range(_MUTATIONS):
        changed = bytearray(wire)
        for _ in range(rnd.randint(1, 4)):
            place = rnd.randrange(len(changed) or 1)
            match rnd.choice(("byte", "cut", "fill", "double", "nothing")):
                case "byte" if changed:
                    changed[place] = rnd.randrange(256)
                case "cut":
                    del changed[place:]
                case "fill":
                    changed[place:place] = rnd.randbytes(rnd.randint(1, 8))
                case "double":
                    changed[place:place] = changed[:place]
                case _:
                    changed = bytearray(rnd.randbytes(rnd.randint(0, 200)))
        yield bytes(changed)
    yield b""
    yield b"\x91" * 100_000  # nested deeper than anybody reads
    for name in ("text", "messages", "handle", "outputs"):
        yield msgspec.msgpack.encode({name: None})[:-1] + b"\x91" * 100_000
    yield wire + b"\x00"
    yield b"\xdd\xff\xff\xff\xff" + wire  # an array of four thousand million


@pytest.mark.parametrize(
    ("wire", "read", "error"), DECODERS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_decoder_raises_its_own_error_and_quotes_nothing(
    wire: bytes, read: Callable[[bytes], Any], error: type[Exception]
) -> None:
    assert read(wire) is not None
    errors: list[Exception] = []

    for changed in mutations(wire, random.Random(_SEED)):
        try:
            read(changed)
        except error as exc:
            errors.append(exc)

    assert len(errors) > _MUTATIONS / 4, "most of it is nonsense"
    # Nor does a traceback show anything, with all its causes.
    assert "canary" not in "".join("".join(traceback.format_exception(exc)) for exc in errors)


@pytest.mark.parametrize(
    "absurd",
    [
        {"deadline": float("nan")},  # an event loop's timers would be in disorder
        {"deadline": float("inf")},
        {"deadline": -1.0},
        {"submitted_at": 1e300},
        {"request_id": "one\nline more"},
        {"request_id": "x" * 300},
        {"handed_on": -1},
        {"output_token_ids": (-1,)},
        {"prefill": {"stage": "none"}},
    ],
    ids=str,
)
def test_absurd_values_are_refused_where_a_message_is_read(absurd: dict[str, Any]) -> None:
    wire = msgspec.to_builtins(_MESSAGES[2], builtin_types=(bytes,)) | absurd

    with pytest.raises(IncompatibleWorker, match="unreadable DecodeJob"):
        read_message(DecodeJob, msgspec.msgpack.encode(wire))


@pytest.mark.parametrize(
    "absurd",
    [
        {"positions": (-5,)},
        {"stage": "somewhere"},
        {"worker": "w\r\nERROR all is lost"},
        {"reports": {"r": ({"prompt_tokens": -1},)}},
    ],
    ids=str,
)
def test_absurd_replies_are_refused_where_they_are_read(absurd: dict[str, Any]) -> None:
    wire = msgspec.to_builtins(_MESSAGES[3], builtin_types=(bytes,)) | absurd

    with pytest.raises(IncompatibleWorker, match="unreadable StepReply"):
        read_message(StepReply, msgspec.msgpack.encode(wire))
