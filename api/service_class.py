"""For whom is a request made? Somebody who waits, a job, or a line of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum


class ServiceClass(StrEnum):
    """Who goes first where not all can."""

    INTERACTIVE = "interactive"
    JOB = "job"
    BATCH = "batch"


_served: ContextVar[ServiceClass] = ContextVar("service_class", default=ServiceClass.INTERACTIVE)


def service_class() -> ServiceClass:
    """Of what is asked in this context."""
    return _served.get()


@contextmanager
def serving(kind: ServiceClass) -> Iterator[None]:
    """What is asked in this context is of this kind."""
    before = _served.set(kind)
    try:
        yield
    finally:
        _served.reset(before)
