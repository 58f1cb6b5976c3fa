"""Each role may do on broker and bus what it does, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import kombu
import pytest
import valkey
from amqp.exceptions import AccessRefused
from celery.events import EventReceiver

from pdtasks.broker.aborting import Aborter
from pdtasks.bus.connection import connect_async
from pdtasks.bus.orders import ask_to_drain, is_asked_to_drain
from pdtasks.bus.presence import read_workers, read_workers_async
from pdtasks.bus.progress import Progress, tell_progress
from pdtasks.bus.reply import ReplyStream
from pdtasks.cluster.rights import BUS_RIGHTS, User
from pdtasks.naming import DEAD_QUEUE, EXCHANGE, KEPT_QUEUE, STAGES
from pdtasks.pipeline import Publisher
from pdtasks.settings import Settings
from tests.integration.asker import Asker
from tests.integration.conftest import Services, StartWorker
from tests.waiting import until, wait_until


@pytest.fixture
def as_api(our_app: Any, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process sends to RabbitMQ the API's user sends."""
    connect = partial(our_app.connection_for_write, services.rabbit.url_for(User.API))
    monkeypatch.setattr(our_app, "connection_for_write", connect)


@pytest.fixture
def refusals(services: Services) -> Callable[[], list[str]]:
    """What broker and bus have refused to anybody since the test began."""
    services.bus.acl_log_reset()
    log = services.rabbit.process.log
    before = log.stat().st_size

    def seen() -> list[str]:
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        acl = [str(entry) for entry in cast("list[Any]", services.bus.acl_log())]
        return [line for line in lines if "refused" in line] + acl

    return seen


# -- what works ------------------------------------------------------------------------------------


def test_a_whole_request_and_an_abort_need_no_further_right(
    as_api: None,
    start_worker: StartWorker,
    services: Services,
    refusals: Callable[[], list[str]],
) -> None:
    prefill, decode = start_worker("prefill"), start_worker("decode")
    publisher, aborter = Publisher(), Aborter()
    asker = Asker(services.bus, publisher)

    asker.ask("whole")
    wait_until(lambda: asker.finished("whole"))
    decode.steering.hold()
    asker.ask("aborted", max_tokens=100)
    wait_until(lambda: "aborted" in decode.steering.added())
    aborter.abort(["aborted"])
    wait_until(lambda: "aborted aborted" in decode.log)

    assert asker.tokens("whole") == [100, 101, 102, 103]
    aborter.close()
    asker.close()
    assert refusals() == []
    assert "REFUSED" not in prefill.log + decode.log


def test_flower_sees_events_and_asks_workers(
    start_worker: StartWorker,
    asker: Asker,
    our_app: Any,
    services: Services,
    refusals: Callable[[], list[str]],
) -> None:
    start_worker("prefill")
    start_worker("decode")
    seen: set[str] = set()
    with kombu.Connection(services.rabbit.url_for(User.FLOWER)) as connection:
        receiver = EventReceiver(
            connection, {"*": lambda event: seen.add(event["type"])}, app=our_app
        )
        with receiver.consumer_context() as (receiving, _, _):
            asker.ask()
            until_s = time.monotonic() + 20
            while "task-succeeded" not in seen and time.monotonic() < until_s:
                receiving.drain_events(timeout=20)
        assert "task-succeeded" in seen
        answers = our_app.control.inspect(timeout=10, limit=2, connection=connection).ping()

    assert set(answers) == {"prefill1@test", "decode1@test"}
    assert refusals() == []


def test_the_api_does_its_part_on_the_bus(
    services: Services, start_worker: StartWorker, refusals: Callable[[], list[str]]
) -> None:
    start_worker("prefill")

    async def test() -> None:
        settings = Settings(bus_url=services.bus_server.url_for(User.API))
        async with connect_async(settings) as bus:
            lost: list[bool] = []

            async def on_lost() -> None:
                lost.append(True)

            stream = ReplyStream(bus, on_lost)
            await stream.open()
            reading = asyncio.ensure_future(anext(stream.read()))
            await stream._renew()
            assert [w.role for w in await read_workers_async(bus)] == ["prefill"]
            await tell_progress(bus, "r", 1, Progress(state="gone"))
            await until(lambda: services.bus.llen("pd:progress:r:1"))
            reading.cancel()
            await stream.close()
            assert not lost

    asyncio.run(test())
    assert refusals() == []


def test_a_worker_drains_when_the_api_asks_and_its_successor_does_not(
    services: Services, start_worker: StartWorker, refusals: Callable[[], list[str]]
) -> None:
    async def ask() -> None:
        settings = Settings(bus_url=services.bus_server.url_for(User.API))
        async with connect_async(settings) as bus:
            (status,) = await read_workers_async(bus)
            await ask_to_drain(bus, status)

    worker = start_worker("prefill")
    asyncio.run(ask())
    assert worker.wait() == 0

    start_worker("prefill")  # it is ready although the order is still there
    (status,) = read_workers(services.bus)
    assert services.bus.exists(f"pd:order:drain:{status.name}")
    with valkey.Valkey.from_url(services.bus_server.url_for(User.WORKER)) as bus:
        assert not is_asked_to_drain(bus, status)
    services.bus.delete(f"pd:order:drain:{status.name}")
    assert refusals() == []


def test_no_control_message_takes_a_worker_from_its_work(
    start_worker: StartWorker, our_app: Any, services: Services
) -> None:
    worker = start_worker("prefill")
    with kombu.Connection(services.rabbit.url_for(User.FLOWER)) as connection:
        for command in ("shutdown", "cancel_consumer", "pool_shrink", "rate_limit"):
            (answer,) = our_app.control.broadcast(
                command, arguments={}, reply=True, timeout=10, limit=1, connection=connection
            )
            assert answer["prefill1@test"] == {"error": "not answered here"}

    (status,) = read_workers(services.bus)
    assert status.state == "ready"
    assert not worker.has_ended()


# -- what does not: RabbitMQ -----------------------------------------------------------------------


def consume(queue: str) -> Callable[[Any], object]:
    return lambda channel: channel.basic_consume(queue)


def look(queue: str) -> Callable[[Any], object]:
    return lambda channel: channel.basic_get(queue)


def publish(exchange: str, key: str) -> Callable[[Any], object]:
    def attempt(channel: Any) -> None:
        channel.basic_publish_confirm(channel.prepare_message(b"x"), exchange, key, timeout=10)

    return attempt


def declare(queue: str) -> Callable[[Any], object]:
    return lambda channel: channel.queue_declare(queue, durable=True, auto_delete=False)


def delete(queue: str) -> Callable[[Any], object]:
    return lambda channel: channel.queue_delete(queue)


def purge(queue: str) -> Callable[[Any], object]:
    return lambda channel: channel.queue_purge(queue)


ASKERS: list[Callable[[Any], object]] = [
    *(consume(queue) for queue in (*STAGES, DEAD_QUEUE, KEPT_QUEUE)),
    *(look(queue) for queue in (*STAGES, DEAD_QUEUE, KEPT_QUEUE)),
    *(delete(queue) for queue in (*STAGES, KEPT_QUEUE)),
    *(purge(queue) for queue in (*STAGES, KEPT_QUEUE)),
    declare("elsewhere"),
    declare(""),
    publish("", "prefill"),
    publish("pdtasks.dead", ""),
]
FORBIDDEN: dict[User, list[Callable[[Any], object]]] = {
    User.API: [*ASKERS, publish("", "decode"), publish("celeryev", "task.multi")],
    User.CLIENT: [*ASKERS, publish(EXCHANGE, "decode")],
    User.FLOWER: [*ASKERS, publish(EXCHANGE, "prefill"), publish(EXCHANGE, "decode")],
    User.WORKER: [
        *(consume(KEPT_QUEUE), look(KEPT_QUEUE), purge(KEPT_QUEUE)),
        *(declare("elsewhere"), declare(""), publish("", "decode")),
        *(publish(EXCHANGE, "prefill"), publish("celery.pidbox", "")),
    ],
    User.ALL: [declare("elsewhere"), publish("", "prefill")],
}


@pytest.mark.parametrize("user", list(FORBIDDEN))
def test_nothing_else_does_rabbitmq_let_a_role_do(
    services: Services, start_worker: StartWorker, user: User
) -> None:
    start_worker("prefill")  # all queues are there
    start_worker("decode")
    with kombu.Connection(services.rabbit.url_for(user)) as connection:
        for number, attempt in enumerate(FORBIDDEN[user]):
            channel = connection.channel()
            channel.confirm_select()

            with pytest.raises(AccessRefused):
                print(user, number, attempt(channel))  # noqa: T201 - seen only when it fails


# -- what does not: the bus ------------------------------------------------------------------------

FOR_NOBODY = (
    *("FLUSHALL", "FLUSHDB", "CONFIG GET *", "KEYS *", "MONITOR", "SHUTDOWN", "ACL LIST"),
    *("CLIENT LIST", "CLIENT KILL ID 1", "EVAL return(1) 0", "FUNCTION LIST", "SELECT 1"),
    *("REPLICAOF NO ONE", "PSUBSCRIBE *", "GET elsewhere", "SET elsewhere x"),
    *("SET pd:elsewhere x", "RENAME pd:job:x pd:job:y", "DUMP pd:job:x", "OBJECT FREQ pd:job:x"),
)
FORBIDDEN_ON_BUS: dict[User, tuple[str, ...]] = {
    User.API: (
        *("SET pd:worker:x y", "DEL pd:worker:x", "XADD pd:reply:x * m y", "GET pd:worker:x"),
        *("SUBSCRIBE celery-task-meta-x", "BLPOP pd:progress:r:1 1"),
        *("LRANGE pd:progress:r:1 0 -1", "DEL celery-task-meta-x", "SET pd:probe x"),
        "GET pd:order:x",
    ),
    User.WORKER: (
        *("XREAD STREAMS pd:reply:x 0", "XRANGE pd:reply:x - +", "DEL pd:reply:x"),
        *("SET pd:order:x y", "MGET pd:api:x", "ZADD pd:apis 1 x"),
        *("HGETALL pd:batch:x", "GET pd:file:x:0", "DEL pd:file:x", "LRANGE pd:batch:x:lines 0 -1"),
        *("HGETALL pd:job:x", "DEL pd:job:x", "ZRANGE pd:jobs 0 -1", "EVALSHA x 0"),
        *("SCRIPT LOAD return(1)", "RPUSH pd:progress:r:1 x", "SUBSCRIBE celery-task-meta-x"),
        *("DEL celery-task-meta-x", "PUBLISH elsewhere x", "PERSIST pd:worker:x", "INFO"),
    ),
    User.CLIENT: (
        *("SET pd:order:x y", "GET pd:order:x"),
        *("SCAN 0", "SETEX celery-task-meta-x 9 y", "PUBLISH celery-task-meta-x y"),
        *(
            "HGETALL pd:job:x",
            "XREAD STREAMS pd:reply:x 0",
            "MGET pd:worker:x",
            "SUBSCRIBE x",
            "INFO",
        ),
    ),
    User.BALANCER: (
        *("SET pd:worker:x y", "GET pd:order:x", "SET pd:probe x", "XADD pd:reply:x * m y"),
        *("HGETALL pd:job:x", "GET celery-task-meta-x", "MGET pd:api:x", "INFO"),
    ),
    User.ALL: ("GET pd:probe", "SCRIPT FLUSH", "DEL pd:probe", "XRANGE pd:reply:x - +"),
}


@pytest.mark.parametrize("user", list(BUS_RIGHTS))
def test_nothing_else_does_the_bus_let_a_role_do(services: Services, user: User) -> None:
    with valkey.Valkey.from_url(services.bus_server.url_for(user)) as bus:
        assert bus.ping()
        for command in (*FOR_NOBODY, *FORBIDDEN_ON_BUS[user]):
            with pytest.raises(valkey.exceptions.NoPermissionError):
                print(user, command, bus.execute_command(*command.split()))  # noqa: T201


def test_the_buss_default_user_is_off(services: Services) -> None:
    place = services.bus_server.url.rpartition("@")[2]
    for user in ("", "default@", "default:@"):
        with (
            valkey.Valkey.from_url(f"valkey://{user}{place}") as nobody,
            pytest.raises(valkey.AuthenticationError),
        ):
            nobody.ping()
