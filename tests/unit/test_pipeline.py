"""How does a request get into the pipeline? What can be said without a broker."""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from pdtasks.errors import InvalidRequest
from pdtasks.messages import DecodeJob, PrefillJob, StageReport
from pdtasks.naming import DECODE, DECODE_TASK
from pdtasks.pipeline import UNUSED_HEADERS, Publisher, next_stage, same_stage, submit
from pdtasks.tracing import carried_by

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.mark.parametrize("both", [True, False])
def test_a_request_has_either_a_prompt_or_messages(both: bool) -> None:
    with pytest.raises(InvalidRequest, match="either"):
        submit("a" if both else None, messages=[] if both else None)


class Everything:
    """Declared already."""

    def __contains__(self, _: object) -> bool:
        return True


class Producer:
    """Takes messages."""

    def __init__(self) -> None:
        client = SimpleNamespace(declared_entities=Everything())
        self.channel = SimpleNamespace(connection=SimpleNamespace(client=client))
        self.headers: list[dict[str, Any]] = []

    def publish(self, _body: object, headers: dict[str, Any], **_: object) -> None:
        self.headers.append(headers)


def test_a_message_has_the_headers_that_say_something_and_no_others() -> None:
    producer = Producer()
    publisher = Publisher()

    def send(publish: Any, **_: object) -> Future[None]:
        publish(producer)
        return Future()

    publisher._sender.send = send  # type: ignore[method-assign]
    job = PrefillJob(request_id="r", engine="e", model=None, submitted_at=1.0, deadline=2.0)

    publisher.send(job, "pd:reply:1")

    (headers,) = producer.headers
    assert not UNUSED_HEADERS & set(headers)
    assert headers["id"] == "r.prefill"
    assert headers["ignore_result"] is True
    assert headers["argsrepr"] == "-"


def test_a_trace_goes_along_in_headers_through_all_stages() -> None:
    producer = Producer()
    job = DecodeJob(
        request_id="r",
        engine="e",
        model=None,
        request=b"",
        output_token_ids=(1,),
        handle=None,
        prefill=StageReport(
            stage="prefill",
            worker="w",
            queue_s=0,
            seconds=0,
            prompt_tokens=1,
            output_tokens=1,
        ),
        detokenise=False,
        submitted_at=1.0,
        prefilled_at=1.0,
        first_token_at=1.0,
        deadline=2.0,
    )
    step = {"task": DECODE_TASK, "options": {"queue": DECODE, "reply_to": None}}
    before = time.time()

    for publish in (
        next_stage(job, [step], parent_id="r.prefill", root_id="r.prefill", trace=PARENT),
        same_stage(job, task_id="r", trace=PARENT),
    ):
        publish(producer)  # type: ignore[arg-type]

    for headers in producer.headers:
        carried = carried_by(headers)
        assert carried.parent == PARENT
        assert before <= carried.sent_at <= time.time()
