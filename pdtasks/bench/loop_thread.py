"""An event loop in a thread of its own, for clients, while the main thread sees to the stack."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

#: Seconds that tasks get to end when they are cancelled.
_END_S = 5.0


class LoopThread:
    """Runs coroutines in its own thread; a context, at whose end all of them are cancelled."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def tell(self, callback: Callable[[], object]) -> None:
        """Have `callback` called there."""
        self._loop.call_soon_threadsafe(callback)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.call(self._cancel_all()).result(2 * _END_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END_S)
        self._loop.close()

    @staticmethod
    async def _cancel_all() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=_END_S)
