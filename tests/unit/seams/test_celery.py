"""What of Celery, kombu and amqp do we replace or rely on? By name, so that an upgrade says so.

A test that fails here after an upgrade means: read what changed, then `pdtasks/worker/consumer.py`,
`celery_worker.py`, `celery_request.py` and `events.py`.
"""

from __future__ import annotations

import inspect
import re
import threading
from typing import Any

import amqp.method_framing
import amqp.transport
import celery.worker.loops
import celery.worker.request
import pytest
from celery.app.task import Context
from celery.apps.worker import Worker
from celery.concurrency.thread import TaskPool
from celery.events.dispatcher import EventDispatcher
from celery.result import AsyncResult
from celery.worker import heartbeat
from celery.worker.consumer import Consumer
from celery.worker.consumer.control import Control
from celery.worker.consumer.events import Events
from celery.worker.consumer.tasks import Tasks
from celery.worker.control import Panel
from celery.worker.request import Request
from kombu.asynchronous import Hub
from kombu.pidbox import Mailbox, Node

from pdtasks.pipeline import UNUSED_HEADERS
from pdtasks.worker.consumer import EventsStep, StageConsumer
from pdtasks.worker.events import EventSender


def source_of(thing: Any) -> str:
    return inspect.getsource(thing)


def test_celerys_steps_are_those_we_have_chosen_from() -> None:
    assert Consumer.Blueprint.default_steps == [
        "celery.worker.consumer.connection:Connection",
        "celery.worker.consumer.mingle:Mingle",
        "celery.worker.consumer.events:Events",
        "celery.worker.consumer.gossip:Gossip",
        "celery.worker.consumer.heart:Heart",
        "celery.worker.consumer.control:Control",
        "celery.worker.consumer.tasks:Tasks",
        "celery.worker.consumer.delayed_delivery:DelayedDelivery",
        "celery.worker.consumer.consumer:Evloop",
        "celery.worker.consumer.agent:Agent",
    ]
    ours = [step.__name__.rpartition(".")[2] for step in StageConsumer.Blueprint.default_steps]
    assert ours == [
        "Connection",
        "EventsStep",
        "HeartStep",
        "TasksStep",
        "ControlStep",
        "DeadLetterStep",
        "Evloop",
    ]


def test_the_fault_that_our_events_avoid_is_still_there() -> None:
    # The event connection is read by the main loop, and written by whoever ends a task: when
    # this is gone, Celery's own dispatcher may do.
    assert "register_with_event_loop(conn.connection, c.hub)" in source_of(Events.start)
    assert "with self.mutex" in source_of(EventDispatcher.flush)


def test_our_events_stand_in_for_all_that_a_worker_uses_of_a_dispatcher() -> None:
    users = [
        celery.worker.loops,
        heartbeat,
        inspect.getmodule(Consumer),
        inspect.getmodule(Events),
        inspect.getmodule(Request),
        inspect.getmodule(Panel),
    ]
    names = {name for name in vars(EventDispatcher) if not name.startswith("_")}
    names |= {"on_enabled", "on_disabled", "groups", "enabled", "hostname", "connection"}
    used = {
        name
        for module in users
        for name in names
        if f"eventer.{name}" in source_of(module)
        or f"dispatcher.{name}" in source_of(module)
        or f"dis.{name}" in source_of(module)
    }
    assert "send" in used

    missing = [
        name
        for name in used
        if not hasattr(EventSender, name)
        and f"self.{name} = " not in source_of(EventSender.__init__)
        and f"self.{name}: " not in source_of(EventSender.__init__)
    ]

    # Only Celery's own step, which ours replaces, hands buffers over.
    assert missing == ["extend_buffer"]
    assert EventsStep.start is not Events.start


def test_pool_threads_acknowledge_through_the_main_loop() -> None:
    # One connection, one thread: an acknowledgement is queued for the loop that owns it.
    assert "return self.hub.call_soon(p)" in source_of(Consumer.call_soon_ack)
    assert "call_soon_ack" in source_of(Consumer.create_task_handler)


def test_the_loop_wakes_when_another_thread_calls_soon() -> None:
    hub = Hub()
    called = threading.Event()
    try:
        thread = threading.Thread(target=lambda: hub.call_soon(called.set))
        thread.start()
        thread.join()
        loop = hub.create_loop()
        while not called.is_set():
            next(loop)
    finally:
        hub.close()
    assert called.is_set()


def test_control_queues_are_still_one_for_a_name() -> None:
    assert "self.mailbox.get_queue(self.hostname)" in source_of(Node.Consumer)
    assert "exclusive=self.queue_exclusive" in source_of(Mailbox.get_queue)


def test_amqp_has_a_lock_for_writers() -> None:
    # Belt and braces: should two threads write all the same, frames stay whole (amqp 5.4.2, its
    # issue 462; the lower bound in pyproject.toml).
    assert "buffer_lock = threading.Lock()" in source_of(amqp.method_framing.frame_writer)


def test_a_transport_of_amqp_keeps_what_it_was_given_and_did_not_ask_for() -> None:
    # `pdtasks/broker/reading.py` has it given all that is there, and looks for frames in that.
    for transport in (amqp.transport.TCPTransport, amqp.transport.SSLTransport):
        read = source_of(transport._read)
        assert "recv = self._quick_recv" in read
        assert "result, self._read_buffer = rbuf[:n], rbuf[n:]" in read
    # All reading goes through what is replaced there.
    assert "while not self.blocking_read(timeout)" in source_of(amqp.Connection.drain_events)


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            Request,
            ["_announce_revoked", "_already_revoked", "_already_cancelled", "_context", "info"],
        ),
        (Consumer, ["call_soon", "on_connection_error_after_connected", "on_ready", "connect"]),
        (Consumer, ["on_unknown_message", "on_unknown_task", "on_invalid_task", "on_decode_error"]),
        (Worker, ["on_before_init", "on_init_blueprint", "on_consumer_ready", "stop"]),
        (Node, ["reply", "handle"]),
        (Mailbox, ["get_queue", "__call__"]),
        (TaskPool, ["on_stop"]),
        (AsyncResult, ["get", "_get_task_meta", "_maybe_set_cache"]),
        (Control, ["__init__"]),
        (Tasks, ["start", "requires"]),
    ],
)
def test_what_we_override_or_call_is_there(owner: type, names: list[str]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]

    # Attributes that Celery sets in __init__ or declares as slots of a class are found there.
    assert [name for name in missing if name not in source_of(owner)] == []


def test_control_commands_that_we_answer_ourselves_are_celerys() -> None:
    assert "revoke" in Panel.data
    # and ours are not in Celery's registry, which all apps of a process share
    assert "pdtasks_abort" not in Panel.data


def test_a_job_needs_none_of_the_headers_that_ours_do_not_have() -> None:
    # What is not there is as Celery has it by default.
    assert [name for name in UNUSED_HEADERS if not hasattr(Context, name)] == []
    needed = set(re.findall(r"_request_dict\['(\w+)'\]", source_of(celery.worker.request)))

    # `shadow` is looked for before.
    assert needed & UNUSED_HEADERS == {"shadow"}
    assert "if 'shadow' in self._request_dict" in source_of(celery.worker.request)
    assert needed >= {"id", "task"}


def test_a_task_sees_the_headers_that_are_none_of_celerys() -> None:
    # The trace of a job: `StageTask.carried`.
    headers = Context({"id": "i", "task": "t", "traceparent": "x", "trace_sent_at": 1.0}).headers
    assert headers == {"traceparent": "x", "trace_sent_at": 1.0}
