"""Has somebody asked us to stop?

::

    with StopSignals() as signals:      # SIGINT, SIGTERM and SIGHUP are only counted
        signals.check()                 # in every loop: raises StopRequested after a signal
        with signals.interruptible():   # code with loops of its own: raised in its middle
            ...
        signals.accept()                # the stop begins; the next signal wants it at once

Counting instead of raising keeps what is being done in one piece: a child that was just started is
noted before anything gives way.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Final, Self

_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopRequested(Exception):
    """Ctrl-C, SIGTERM or a closed terminal."""


class StopSignals:
    """The signals that ask this process to stop, taken over while the `with` block runs.

    Main thread only, as Python wants it for handlers.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._accepted = 0  # those that already began a stop
        self._interruptible = False
        self._before: dict[signal.Signals, _Handler] = {}

    def check(self) -> None:
        """Raises StopRequested when a signal came that `accept` does not know."""
        if self._seen > self._accepted:
            raise StopRequested

    def accept(self) -> None:
        """All signals up to now are being obeyed; only a further one counts."""
        self._accepted = self._seen

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal ends the body at once with StopRequested, for code that does not `check`."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._seen += 1
        if self._interruptible:
            raise StopRequested

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in _NUMBERS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
