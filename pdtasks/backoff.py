"""How long until the next try? Longer with each failure in a row."""

from __future__ import annotations


class Backoff:
    """Pauses that double from `first_s` to `maximum_s`. For one thread."""

    def __init__(self, *, first_s: float = 0.5, maximum_s: float = 30.0) -> None:
        self._first_s = first_s
        self._maximum_s = maximum_s
        self._failures = 0

    @property
    def pause_s(self) -> float:
        """Seconds to wait now; 0 after a success."""
        if not self._failures:
            return 0.0
        return min(self._first_s * 2.0 ** (self._failures - 1), self._maximum_s)

    def fail(self) -> None:
        """A try has failed."""
        # Bounded: the power of a large number would overflow.
        self._failures = min(self._failures + 1, 64)

    def succeed(self) -> None:
        """The next failure is the first again."""
        self._failures = 0
