"""Prefill and decode of large language models as two Celery tasks.

`celery -A pdtasks worker` looks for the attribute `celery` here; it is made on first use so
that `pdtasks.kv` can be imported (by plain `vllm serve`, say) without Celery.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

__version__ = "0.1.0"


def __getattr__(name: str) -> Celery:
    if name == "celery":
        from pdtasks.app import app

        return app
    raise AttributeError(f"module 'pdtasks' has no attribute {name!r}")
