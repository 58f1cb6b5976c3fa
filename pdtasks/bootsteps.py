"""How does a Celery worker of ours differ from a stock one?

* It refuses another pool than threads, and more than one stage, with one sentence.
* Its engine is up before it consumes (`worker_init`: no connection exists yet).
* Its requests can be cancelled, and show nothing of their arguments.
* It does not declare Celery's 28 delayed-delivery queues: no task of ours has an ETA.
* It answers for jobs that no worker survived (dead-letter queue).
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import kombu
from celery import Celery, bootsteps, signals, states
from celery.worker.consumer import Consumer
from celery.worker.control import control_command
from celery.worker.request import Request

from pdtasks import naming
from pdtasks.errors import PdtasksError, WorkerLost
from pdtasks.settings import load_settings

logger = logging.getLogger(__name__)


class StageRequest(Request):  # type: ignore[misc]  # Celery has no types
    """A job in a worker."""

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `celery inspect` and Flower may know: never the arguments."""
        return super().info(safe=True)  # type: ignore[no-any-return]

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """`revoke(terminate=True)`; the stock one cannot on the threads pool."""
        _abort([naming.request_id_of(self.id)])
        self._announce_revoked("terminated", True, "abort", False)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Cold shutdown: the process ends, RabbitMQ gives the job to another worker."""
        self._already_cancelled = True


class StageConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer without the step for delayed delivery."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        default_steps = tuple(
            step for step in Consumer.Blueprint.default_steps if "delayed_delivery" not in str(step)
        )


class DeadLetterStep(bootsteps.ConsumerStep):  # type: ignore[misc]
    """Tells the askers of jobs that were delivered too often that there will be no answer."""

    def get_consumers(self, channel: Any) -> list[kombu.Consumer]:
        queue = kombu.Queue(
            naming.DEAD_QUEUE,
            exchange=kombu.Exchange(naming.DEAD_EXCHANGE, type="fanout", durable=True),
            durable=True,
            queue_arguments={"x-queue-type": "quorum"},
        )
        return [
            kombu.Consumer(
                channel,
                queues=[queue],
                callbacks=[self.give_up],
                accept=["msgpack", "json"],
                prefetch_count=1,
            )
        ]

    def give_up(self, body: Any, message: kombu.Message) -> None:
        """Answer for one dead job."""
        from pdtasks import worker
        from pdtasks.app import app, wants_result

        task_id = message.headers.get("id", "")
        request_id = naming.request_id_of(task_id)
        error = WorkerLost(
            f"the {message.headers.get('task', 'task')} job was delivered "
            f"{load_settings().delivery_limit} times and every worker that took it was lost"
        )
        logger.error("gave up %s: %s", request_id, error)
        worker.current().publish_failure(message.properties.get("reply_to"), request_id, error)
        chain = body[2].get("chain") if isinstance(body, list | tuple) and len(body) == 3 else None
        ignored = message.headers.get("ignore_result", False)
        if wants_result(chain) or (task_id == request_id and not ignored):
            app.backend.store_result(request_id, error, states.FAILURE)
        message.ack()


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


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _start_worker(sender: Any, **_: Any) -> None:
    """Check how we were called, then bring up the engine.

    Celery swallows exceptions here and would consume without an engine: leave by SystemExit.
    """
    queues = set(sender.app.amqp.queues.consume_from)
    pool = str(getattr(sender.pool_cls, "__module__", sender.pool_cls))
    if "thread" not in pool:
        _refuse(f"pdtasks workers need the threads pool (-P threads), not {pool}")
    if len(queues) != 1 or not queues <= set(naming.STAGES):
        _refuse("a pdtasks worker serves one stage: start it with -Q prefill or -Q decode")
    try:
        settings = load_settings()
        settings.require_broker()
        settings.require_bus()
        from pdtasks import worker

        worker.start(settings, name=sender.hostname, role=queues.pop())
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
