"""How does a Celery worker of ours differ from a stock one?

* It refuses another pool than threads, other queues than the stages' and another worker's name,
  with one sentence; without a name of its own it has its role's.
* The queues that it is to consume from say which model it serves (`docs/models.md`).
* Its engine is up before it consumes: no connection exists yet.
* It says on the bus how it is, and ends when it stands.
* Its main loop (`consumer.py`) and its jobs (`celery_request.py`) are ours.

All by subclass: another app's worker in the same process is a stock one.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from celery import signals
from celery.apps.worker import Worker
from celery.utils.nodenames import NODENAME_DEFAULT

from pdtasks import naming, tracing
from pdtasks.errors import PdtasksError, where
from pdtasks.links import require_trusted
from pdtasks.settings import Settings, load_settings
from pdtasks.worker import liveness, service

logger = logging.getLogger(__name__)

# A line for each job that comes, before its work begins; the one that says how it ended stays.
logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)

#: Writes all threads' stacks into the log; also when the interpreter stands.
STACKS_SIGNAL = signal.SIGUSR2


class StageWorker(Worker):  # type: ignore[misc]  # Celery has no types
    """A worker of one stage or both, with its engine."""

    hostname: str

    def on_before_init(self, quiet: bool = False, **options: Any) -> None:
        """Refuse what cannot work, before Celery looks for queues."""
        self._settings = _check_call(options, self.app.conf)
        self.hostname = _name_of(self.hostname, options["queues"])
        super().on_before_init(quiet=quiet, **options)

    def on_init_blueprint(self) -> None:
        """Bring up the engine; a worker without one would consume all the same."""
        stages, _ = _stages_and_model(self.app.amqp.queues.consume_from)
        settings = self._settings
        try:
            for stage in naming.STAGES:
                import_module(f"pdtasks.{stage}")  # registers its task: the role may change
            super().on_init_blueprint()
            if sys.__stderr__ is not None:
                faulthandler.register(STACKS_SIGNAL, file=sys.__stderr__, all_threads=True)
            # Celery tells of a signal that asks for a stop in no other way.
            signals.worker_shutting_down.connect(
                self._stop_is_requested, sender=self.hostname, weak=False
            )
            # (Celery knows the number behind "auto" only later.)
            slots = self.concurrency if isinstance(self.concurrency, int) else 0
            service.start(
                self.app,
                settings,
                name=self.hostname,
                role=naming.role_of(stages),
                slots=slots or settings.max_num_seqs,
            )
        except PdtasksError as exc:
            _refuse(str(exc))
        except Exception as exc:  # noqa: BLE001 - whatever it is, one sentence ends the start
            logger.error("the worker did not start: %s", where(exc))  # noqa: TRY400
            _refuse(f"{type(exc).__name__}: {exc}")

    def on_consumer_ready(self, consumer: Any) -> None:
        super().on_consumer_ready(consumer)
        service.current().presence.enter("ready")

    def _stop_is_requested(self, **_: Any) -> None:
        here = service.current()
        here.liveness.stop_requested()
        here.presence.enter("draining")

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        here = service.current()
        here.presence.enter("draining")
        here.liveness.stopping()
        super().stop(in_sighandler, exitcode)
        here.stop()
        liveness.leave_at_exit(self.exitcode or 0)


def _check_call(options: dict[str, Any], conf: Any) -> Settings:
    """The settings of what the worker serves; it ends here if it cannot."""
    pool = options.get("pool") or options.get("pool_cls") or conf.worker_pool
    pool = str(getattr(pool, "__module__", pool))
    if "thread" not in pool or _asks_for_prefork(sys.argv):
        _refuse("pdtasks workers need the threads pool (-P threads): tasks share one engine")
    queues = _listed(options.get("queues"))
    stages, models = _stages_and_model(queues)
    if not queues or not set(stages) <= set(naming.STAGES):
        _refuse(
            "start a pdtasks worker with -Q prefill, -Q decode, or -Q prefill,decode for both; "
            "for another model than the default one with -Q prefill.NAME, and so on"
        )
    if len(models) > 1:
        _refuse("a worker serves one model: all queues behind -Q have to be of the same")
    try:
        settings = load_settings()
        if model := models.pop():
            settings = settings.of_model(model)
        settings.require_broker()
        settings.require_bus()
        settings.require_kv()
        require_trusted(settings)
        tracing.require_usable()
    except PdtasksError as exc:
        _refuse(str(exc))
    return settings


def _listed(queues: str | Sequence[str] | None) -> list[str]:
    return queues.split(",") if isinstance(queues, str) else list(queues or ())


def _name_of(name: str, queues: str | Sequence[str]) -> str:
    """`name`, or the role's where none was given, as its queue has it: `prefill`, `both.NAME`.

    A worker of each role and model on one host needs none. Celery would call all of them the same.
    """
    short, _, host = name.partition("@")
    if short != NODENAME_DEFAULT:
        return name
    stages, models = _stages_and_model(_listed(queues))
    return f"{naming.queue_of(naming.role_of(stages), models.pop())}@{host}"


def _stages_and_model(queues: Iterable[str]) -> tuple[list[str], set[str]]:
    """Of all `queues`. A worker's are of one model; empty: the default one."""
    found = [naming.stage_and_model(queue) for queue in queues]
    return [stage for stage, _ in found], {model for _, model in found}


def _asks_for_prefork(arguments: list[str]) -> bool:
    # Celery takes `-P prefork` for its own default and puts `worker_pool` in its place.
    spelt = " ".join(arguments).replace("=", " ").replace("--pool", "-P").replace("-P ", "-P")
    return "-Pprefork" in spelt.split() or "-Pprocesses" in spelt.split()


def _refuse(why: str) -> NoReturn:
    sys.stderr.write(f"pdtasks: {why}\n")
    liveness.leave_at_exit(2)
    raise SystemExit(2)
