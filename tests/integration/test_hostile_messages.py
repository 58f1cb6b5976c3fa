"""Does a worker stay at work, whatever anybody sends to its queues? And is nothing of it logged?"""

from __future__ import annotations

import pickle
import random
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import amqp
import kombu
import msgspec

from pdtasks import naming
from pdtasks.bus.presence import read_workers
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.wire import encode_request
from pdtasks.messages import PrefillJob
from tests.integration.asker import Asker, engine_request
from tests.integration.conftest import Services, StartWorker, StubWorker
from tests.waiting import wait_until

SECRET = "canary-of-a-prompt"
#: Fewer than there are messages of any kind: a place that one of them keeps would be missed.
CONCURRENCY = 2
MSGPACK = {"content_type": "application/x-msgpack", "content_encoding": "binary"}
JSON = {"content_type": "application/json", "content_encoding": "utf-8"}
PICKLE = {"content_type": "application/x-python-serialize", "content_encoding": "binary"}


class _Raw(amqp.Message):  # type: ignore[misc]  # amqp has no types
    """With properties that py-amqp would not write."""

    raw = b""

    def _serialize_properties(self) -> bytes:
        return self.raw


def with_raw_properties(raw: bytes) -> amqp.Message:
    message = _Raw(SECRET)
    message.raw = raw
    return message


def a_message(body: bytes, kind: dict[str, str], headers: dict[Any, Any]) -> amqp.Message:
    properties = {"application_headers": headers, "reply_to": "pd:reply:nobody", **kind}
    return amqp.Message(body, delivery_mode=2, **properties)


def envelope(stage: str, **changes: Any) -> dict[str, Any]:
    request_id = f"hostile-{time.monotonic_ns()}"
    last = stage == naming.DECODE
    return {
        "id": request_id if last else naming.prefill_task_id(request_id),
        "task": f"pdtasks.{stage}",
        "lang": "py",
        "argsrepr": "-",
        "kwargsrepr": "-",
        "ignore_result": True,
        **changes,
    }


def a_body(wire: Any, embedded: Any = None, kwargs: Any = None) -> bytes:
    return msgspec.msgpack.encode([[wire], kwargs or {}, embedded or {"chain": None}])


def a_job(**changes: Any) -> PrefillJob:
    now = time.time()
    request = engine_request("hostile", stop=[SECRET])
    fields: dict[str, Any] = {
        "request_id": "hostile",
        "engine": ENGINE_VERSION,
        "model": None,
        "request": encode_request(request),
        "submitted_at": now,
        "deadline": now + 60,
    }
    return PrefillJob(**fields | changes)


def hostile_to(stage: str) -> Iterator[amqp.Message]:
    """Real messages that somebody has spoilt, and what never was one."""
    rnd = random.Random(16)
    good = a_body(a_job().to_wire())
    # No envelope
    yield amqp.Message(SECRET)
    yield amqp.Message(b"")
    yield a_message(rnd.randbytes(100), {}, {})
    yield a_message(good, MSGPACK, {})
    # Properties that py-amqp cannot read: no UTF-8, a time in the year 50000
    yield with_raw_properties(struct.pack(">HB4s", 0x8000, 4, b"\xff\xfe\xfd\xfc"))
    table = b"\x04timeT" + struct.pack(">Q", 2**63)
    yield with_raw_properties(struct.pack(">HI", 0x2000, len(table)) + table)
    # Headers of other types, and absurd ones
    for changes in (
        {"id": [SECRET]},
        {"id": None},
        {"id": f"two\nlines of {SECRET}"},
        {"task": ["no", "name"]},
        {"task": SECRET},
        {"eta": "9999-12-31T00:00:00"},
        {"eta": SECRET},
        {"expires": -(2**40)},
        {"expires": SECRET},
        {"retries": 2**40},
        {"retries": SECRET},
        {"timelimit": [1, 2, 3]},
        {"timelimit": SECRET},
        {"reply_to": {"nested": [SECRET]}},
        {"argsrepr": SECRET},
        {"shadow": {"a": SECRET}},
        {"stamped_headers": [SECRET], "stamps": {SECRET: 1}},
        {"group": [1], "group_index": SECRET},
        {"root_id": 7},
        {"x-filler": SECRET * 5000},  # nearly as large as a frame may be
    ):
        yield a_message(
            good if "x-filler" not in changes else b"", MSGPACK, envelope(stage, **changes)
        )
    # Bodies
    yield a_message(good, JSON, envelope(stage))
    yield a_message(good[: len(good) // 2], MSGPACK, envelope(stage))
    for _ in range(10):
        yield a_message(rnd.randbytes(60), MSGPACK, envelope(stage))
    for kind in (PICKLE, MSGPACK, JSON):
        yield a_message(pickle.dumps([[SECRET], {}, {}]), kind, envelope(stage))
    for odd in (5, SECRET, [], {}, {"args": [SECRET]}, [[b""], {}, [1]], [[b""], {SECRET: 1}, {}]):
        yield a_message(msgspec.msgpack.encode(odd), MSGPACK, envelope(stage))
    for embedded in (
        {"chain": [SECRET]},
        {"chain": [{"task": "pdtasks.prefill", "options": {}}]},
        {"chain": 5},
        {"reply_to": [SECRET]},
        {"chord": SECRET},
    ):
        yield a_message(a_body(a_job().to_wire(), embedded), MSGPACK, envelope(stage))
    # Packed ones
    bomb = zlib.compress(bytes(1 << 24))
    zipped = {**envelope(stage), "compression": "application/x-gzip"}
    yield a_message(bomb, MSGPACK, zipped)
    yield a_message(bomb, {**MSGPACK, "content_encoding": "zlib"}, envelope(stage))
    # Jobs inside a right message
    wire = a_job().to_wire()
    for inside in (
        b"",
        SECRET.encode(),
        wire[: len(wire) // 2],
        a_job(request=SECRET.encode()).to_wire(),
        a_job(request=encode_request(engine_request("hostile"))[:-9]).to_wire(),
        a_job(request=encode_request(engine_request("hostile", (-1, 2**50)))).to_wire(),
        a_job(request=encode_request(engine_request("hostile", (1,) * 5000))).to_wire(),
        a_job(request=None).to_wire(),
        a_job(deadline=float("nan")).to_wire(),
        a_job(deadline=1e300).to_wire(),
        a_job(request_id="two\nlines").to_wire(),
    ):
        yield a_message(a_body(inside), MSGPACK, envelope(stage))
    # A huge one
    yield a_message(
        a_body(bytes(50 << 20 if stage == naming.PREFILL else 5 << 20)), MSGPACK, envelope(stage)
    )


def send(channel: Any, stage: str, messages: Iterator[amqp.Message]) -> int:
    sent = 0
    for message in messages:
        channel.basic_publish(message, naming.EXCHANGE, stage)
        sent += 1
    return sent


def require_well(services: Services, *workers: StubWorker) -> None:
    states = {w.pid: w.state for w in read_workers(services.bus)}
    for worker in workers:
        assert not worker.has_ended(), worker.log[-3000:]
        assert states.get(worker.pid) == "ready"
        assert "canary" not in worker.log
        assert "connecting again" not in worker.log
        assert "RabbitMQ closed the connection" not in worker.log


def require_right(asker: Asker, request_id: str) -> None:
    asker.ask(request_id)
    wait_until(lambda: asker.finished(request_id), what="an honest request is answered")
    assert asker.tokens(request_id) == [100, 101, 102, 103]


def wait_until_empty(channel: Any, *queues: str) -> None:
    """Also of what was given out: it would be there again after the consumer is gone."""

    def left() -> int:
        return sum(
            kombu.Queue(queue, channel=channel).queue_declare(passive=True).message_count
            for queue in queues
        )

    wait_until(lambda: left() == 0, what="the queues are empty")


def test_no_message_on_a_queue_hurts_a_worker_or_other_requests(
    start_worker: StartWorker, asker: Asker, services: Services, channel: Any
) -> None:
    prefill = start_worker("prefill", concurrency=CONCURRENCY)
    decode = start_worker("decode", concurrency=CONCURRENCY)
    require_right(asker, "before")

    sent = 0
    for stage in naming.STAGES:
        sent += send(channel, stage, hostile_to(stage))
        require_right(asker, f"behind-{stage}")

    wait_until_empty(channel, *naming.STAGES, naming.DEAD_QUEUE)
    require_right(asker, "after")
    assert asker.failures() == {}
    require_well(services, prefill, decode)
    refused = [
        line for w in (prefill, decode) for line in w.log.splitlines() if "refused a" in line
    ]
    # Each is told of in a line, once: nothing comes round.  (The others were jobs, and failed.)
    assert sent - 30 < len(refused) <= sent


def test_no_control_message_hurts_a_worker(
    start_worker: StartWorker, asker: Asker, services: Services, channel: Any, our_app: Any
) -> None:
    worker = start_worker("prefill", concurrency=CONCURRENCY)
    start_worker("decode")
    exchange = our_app.control.mailbox.exchange.name

    def command(**fields: Any) -> amqp.Message:
        clock = fields.pop("clock", 1)
        body = msgspec.json.encode({"method": "ping", "arguments": {}} | fields)
        return a_message(body, JSON, {"clock": clock})

    rnd = random.Random(16)
    for message in (
        amqp.Message(SECRET),
        amqp.Message(b""),
        *(a_message(rnd.randbytes(60), kind, {}) for kind in (JSON, MSGPACK, PICKLE, {})),
        a_message(pickle.dumps({"method": SECRET}), PICKLE, {}),
        a_message(b"[" * 100_000, JSON, {}),
        a_message(zlib.compress(bytes(1 << 20)), {**JSON, "content_encoding": "zlib"}, {}),
        with_raw_properties(struct.pack(">HB4s", 0x8000, 4, b"\xff\xfe\xfd\xfc")),
        command(method=SECRET),
        command(method=[SECRET]),
        command(method="shutdown"),
        command(method="hello", arguments={"from_node": "x", "revoked": {"a": SECRET}}),
        command(arguments={SECRET: 1}),
        command(arguments=SECRET),
        command(destination=5),
        command(pattern="(a+)+$", matcher="pcre"),
        command(clock=2**63 - 1),
        command(clock=SECRET),
        command(reply_to={"exchange": "amq.direct", "routing_key": SECRET}),
        command(reply_to={"exchange": naming.EXCHANGE, "routing_key": naming.DECODE}),
        command(reply_to=SECRET),
        command(method=naming.ABORT, arguments={"request_ids": [[SECRET]]}),
        command(method=naming.ABORT, arguments={"request_ids": 5}),
        command(method="revoke", arguments={"task_id": [{"a": SECRET}]}),
        command(method="revoke", arguments={"task_id": 5, "terminate": SECRET}),
        command(method="query_task", arguments={"ids": 5}),
        a_message(bytes(20 << 20), JSON, {}),
    ):
        channel.basic_publish(message, exchange)

    # Then it answers those that are commands, as fast as ever, on the connection that it had
    assert our_app.control.inspect(timeout=10, limit=2).ping().keys() == {
        "prefill1@test",
        "decode1@test",
    }
    require_right(asker, "after")
    require_well(services, worker)
    assert "refused a control message that is no command" in worker.log


def test_every_command_that_asks_is_answered_and_ends_no_worker(
    start_worker: StartWorker, asker: Asker, services: Services, our_app: Any
) -> None:
    """Flower sends most of them; an answer that no message can carry would end the main loop."""
    from pdtasks.worker.control import _ANSWERED

    worker = start_worker("prefill")
    start_worker("decode")
    for command in _ANSWERED:
        arguments = {"ids": ["r"]} if command == "query_task" else {}
        answers = our_app.control.broadcast(
            command, arguments=arguments, reply=True, limit=2, timeout=10
        )
        told = {name: said for answer in answers for name, said in answer.items()}
        assert set(told) == {"prefill1@test", "decode1@test"}, command
        failed = [said for said in told.values() if isinstance(said, dict) and "error" in said]
        assert failed == [], command
    require_right(asker, "after")
    require_well(services, worker)


def test_what_lies_among_the_dead_letters_stops_no_command(
    start_worker: StartWorker, services: Services, channel: Any
) -> None:
    from pdtasks.broker.dead_letters import dead_letters
    from pdtasks.errors import InvalidRequest
    from pdtasks.settings import load_settings

    start_worker("prefill")
    sent = list(hostile_to(naming.PREFILL))[:-1]
    for message in sent:
        channel.basic_publish(message, naming.KEEP_EXCHANGE)

    with dead_letters(load_settings()) as letters:
        found = letters.all()
        for letter in found:
            with suppress(InvalidRequest):
                letter.about()
    assert len(found) >= len(sent) - 2
