"""How does a Celery worker of ours differ from a stock one?

* It refuses another pool than threads, and more than one stage, with one sentence.
* Its engine is up before it consumes (`worker_init`: no connection exists yet).
* Its requests can be cancelled, and show nothing of their arguments.
* It does not declare Celery's 28 delayed-delivery queues: no task of ours has an ETA.
* It answers for jobs that no worker survived (dead-letter queue).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from functools import partial
from importlib import import_module
from typing import Any

import kombu
from celery import Celery, bootsteps, signals, states
from celery.exceptions import InvalidTaskError
from celery.worker.consumer import Consumer
from celery.worker.control import control_command
from celery.worker.request import Request
from kombu.serialization import loads

from pdtasks import naming
from pdtasks.errors import PdtasksError, RequestAborted, WorkerLost
from pdtasks.settings import load_settings

logger = logging.getLogger(__name__)

#: Seconds that Celery gets to leave its signal handler before a cold stop ends the process.
_COLD_STOP_S = 0.5


class StageRequest(Request):  # type: ignore[misc]  # Celery has no types
    """A job in a worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except (AttributeError, TypeError, ValueError) as exc:
            # Celery rejects what raises this; anything else would stop the worker.
            raise InvalidTaskError("not a message of a task") from exc

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `celery inspect` and Flower may know: never the arguments."""
        return super().info(safe=True)  # type: ignore[no-any-return]

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """`revoke(terminate=True)`; the stock one cannot on the threads pool."""
        _abort([naming.request_id_of(self.id)])
        self._announce_revoked("terminated", True, "abort", False)

    def _announce_revoked(self, *args: Any) -> None:
        """Also of a job that was still queued: tell the asker, and free what it owns."""
        from pdtasks import worker

        super()._announce_revoked(*args)
        here, request_id = worker.current(), naming.request_id_of(self.id)
        error = RequestAborted("the request was revoked")
        here.publish_failure(self.reply_to, request_id, error)
        here.discard(request_id)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Cold shutdown: the process ends, RabbitMQ gives the job to another worker.

        Celery would wait for the pool's threads, and they for their answers.
        """
        # Once for each request under way: the first to come ends the process and the others with
        # it; the engine core follows.
        threading.Timer(_COLD_STOP_S, os._exit, (1,)).start()
        self._already_cancelled = True


class StageConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer without the step for delayed delivery."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        default_steps = tuple(
            step for step in Consumer.Blueprint.default_steps if "delayed_delivery" not in str(step)
        )


class DeadLetterStep(bootsteps.ConsumerStep):  # type: ignore[misc]
    """Tells the askers of jobs that were delivered too often that there will be no answer."""

    def __init__(self, parent: Consumer, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._app: Celery = parent.app

    def get_consumers(self, channel: Any) -> list[kombu.Consumer]:
        queue = kombu.Queue(
            naming.DEAD_QUEUE,
            exchange=kombu.Exchange(naming.DEAD_EXCHANGE, type="fanout", durable=True),
            durable=True,
            queue_arguments={"x-queue-type": "quorum"},
        )
        # Whole messages, undecoded: what kills workers may be unreadable as well.
        return [kombu.Consumer(channel, queues=[queue], on_message=self.give_up, prefetch_count=1)]

    def give_up(self, message: kombu.Message) -> None:
        """Answer for one dead job."""
        try:
            self._answer_for(message)
        except Exception:
            logger.exception("a dead job could not be answered for")
        finally:
            message.ack()

    def _answer_for(self, message: kombu.Message) -> None:
        from pdtasks import worker

        task_id = message.headers.get("id")
        if not task_id:
            logger.error("dropped a message that is no task of ours")
            return
        request_id = naming.request_id_of(task_id)
        error = WorkerLost(f"{message.headers.get('task', 'the job')} {_why_dead(message)}")
        logger.error("gave up %s: %s", request_id, error)
        here = worker.current()
        here.publish_failure(message.properties.get("reply_to"), request_id, error)
        is_last = task_id == request_id and not message.headers.get("ignore_result", False)
        if is_last or wants_result(_rest_of_chain(message)):
            # Not in this loop: a bus that is away would block the worker's heartbeats.
            store = partial(self._app.backend.store_result, request_id, error, states.FAILURE)
            here.engine.call(asyncio.to_thread(store))


def _why_dead(message: kombu.Message) -> str:
    deaths = message.headers.get("x-death") or [{}]
    if deaths[0].get("reason") == "rejected":
        return "was refused by a worker that cannot read it"
    limit = load_settings().delivery_limit
    return f"was given up: {limit + 1} deliveries ended with the loss of the worker"


def _rest_of_chain(message: kombu.Message) -> list[dict[str, Any]] | None:
    """The tasks after the one in `message`; Celery keeps them in the body's third part."""
    _, _, embedded = loads(
        message.body,
        message.content_type,
        message.content_encoding,
        accept={"application/x-msgpack", "application/json"},
    )
    chain: list[dict[str, Any]] | None = embedded.get("chain")
    return chain


def wants_result(chain: list[dict[str, Any]] | None) -> bool:
    """Does a Celery client wait for the last task of `chain`?"""
    return chain is not None and any(
        not step["options"].get("ignore_result", False) for step in chain
    )


def install(app: Celery) -> None:
    """Make `app`'s workers ours."""
    app.steps["consumer"].add(DeadLetterStep)


@control_command(name="pdtasks_abort", args=[("request_ids", list)])  # type: ignore[untyped-decorator]
def abort_command(_state: Any, request_ids: list[str]) -> dict[str, str]:
    """Drop requests whose caller has hung up."""
    _abort(request_ids)
    return {"ok": "aborting"}


def _abort(request_ids: list[str]) -> None:
    from pdtasks import worker

    here = worker.current()
    here.engine.loop.call_soon_threadsafe(here.abort, request_ids)


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _check_call(options: dict[str, Any], conf: Any, **_: Any) -> None:
    """Refuse what cannot work, before Celery looks for queues.

    Celery swallows exceptions in signal handlers: leave by SystemExit.
    """
    pool = options.get("pool") or options.get("pool_cls") or conf.worker_pool
    pool = str(getattr(pool, "__module__", pool))
    if "thread" not in pool or _asks_for_prefork(sys.argv):
        _refuse("pdtasks workers need the threads pool (-P threads): tasks share one engine")
    queues = options.get("queues") or []
    queues = queues.split(",") if isinstance(queues, str) else list(queues)
    if len(queues) != 1 or queues[0] not in naming.STAGES:
        _refuse("a pdtasks worker serves one stage: start it with -Q prefill or -Q decode")
    try:
        settings = load_settings()
        settings.require_broker()
        settings.require_bus()
        settings.require_kv()
    except PdtasksError as exc:
        _refuse(str(exc))


def _asks_for_prefork(arguments: list[str]) -> bool:
    # Celery takes `-P prefork` for its own default and puts `worker_pool` in its place.
    spelt = " ".join(arguments).replace("=", " ").replace("--pool", "-P").replace("-P ", "-P")
    return "-Pprefork" in spelt.split() or "-Pprocesses" in spelt.split()


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _start_worker(sender: Any, **_: Any) -> None:
    """Bring up the engine; a worker without one would consume all the same."""
    (role,) = sender.app.amqp.queues.consume_from
    try:
        from pdtasks import worker

        import_module(f"pdtasks.{role}")  # registers the stage's task
        worker.start(load_settings(), name=sender.hostname, role=role)
    except PdtasksError as exc:
        _refuse(str(exc))
    except Exception as exc:
        logger.exception("the worker did not start")
        _refuse(f"{type(exc).__name__}: {exc}")


def _refuse(why: str) -> None:
    sys.stderr.write(f"pdtasks: {why}\n")
    raise SystemExit(2)


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _announce_ready(**_: Any) -> None:
    from pdtasks import worker

    worker.current().enter("ready")


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _announce_draining(**_: Any) -> None:
    from pdtasks import worker

    worker.current().enter("draining")


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _stop_worker(**_: Any) -> None:
    from pdtasks import worker

    worker.current().stop()
