"""The Celery app. Whoever only publishes imports nothing of the worker with it."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.utils.objects import cached_property

from pdtasks import collecting


class StagesApp(Celery):  # type: ignore[misc]  # Celery has no types
    """An app whose workers are ours."""

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        """The class of this app's workers.

        Imported by workers alone, and the stages with it: publishers and Flower need no vLLM.
        """
        with collecting.rarely():
            return self.subclass_with_self(
                "pdtasks.worker.celery_worker:StageWorker", name="Worker"
            )


# Not the process's current app: whoever imports this to publish may have one of their own.
app = StagesApp("pdtasks", set_as_current=False)
app.config_from_object("configs.celeryconfig")
