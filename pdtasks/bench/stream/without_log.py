"""The stub, and a worker and an API that do not tell attempts at a request from one another.

That is what makes going on after a lost worker sound (`api.attempts`); a run without it says what
it costs.  Only here: names of the product are replaced in processes that the bench forks off.
"""

from __future__ import annotations

from typing import Any

from api.attempts import Attempts
from pdtasks.bench.stream.stub import NoText, start_stub
from pdtasks.worker.answering import Answers

__all__ = ["NoText", "start_stub"]


def _count_all(*_: Any, **__: Any) -> bool:
    return True


_put = Answers._put  # noqa: SLF001


def _put_without_attempts(self: Answers, stream: str | None, stage: str, **content: Any) -> None:
    content.pop("attempts", None)
    _put(self, stream, stage, **content)


Attempts.counts = _count_all  # type: ignore[method-assign]  # that is what this module is for
Answers._put = _put_without_attempts  # type: ignore[method-assign]  # noqa: SLF001
