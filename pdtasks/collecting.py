"""When does Python look for garbage while a process starts? Hardly ever: what it imports stays.

vLLM's import makes 600,000 objects that live as long as the process.  To look through them again
and again took 3.7 of 19 CPU seconds.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: New objects before a look at the youngest; looks at these before one at the older ones; at all.
_RARELY = (100_000, 50, 50)


@contextmanager
def rarely() -> Iterator[None]:
    """While this process imports; what is there at the end is never looked through again."""
    before = gc.get_threshold()
    gc.set_threshold(*_RARELY)
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*before)


def rarely_in_children() -> None:
    """Also in processes that `multiprocessing` starts afresh from now on, and in their children.

    Until the first full collection: vLLM's engine has one when it has started.
    """
    # What is unpickled there first, before the function that the process is to run: that imports.
    vars(multiprocessing.current_process())["_config"]["pdtasks_collecting"] = _Begun()


class _Begun:
    """Unpickled, it has begun."""

    def __reduce__(self) -> tuple[Callable[[], _Begun], tuple[()]]:
        return _begin, ()


def _begin() -> _Begun:
    before = gc.get_threshold()

    def end(_phase: str, info: dict[str, Any]) -> None:
        if info["generation"] == 2:
            gc.callbacks.remove(end)
            gc.set_threshold(*before)

    gc.callbacks.append(end)
    gc.set_threshold(*_RARELY)
    return _Begun()
