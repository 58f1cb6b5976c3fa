"""Who of several does it now? One holder at a time, each with a higher number than those before.

The number fences: who acts for a holder compares it with the highest that it has seen itself, so
that one that was frozen and has lost its lease takes nothing back when it wakes.
"""

from __future__ import annotations

import secrets
import time
from typing import Final, cast

import valkey

#: Behind the lease's key: the last holder's number.
_NUMBER: Final = ":number"


class Lease:
    """One process's hold of a lease, or its wait for it. For one thread."""

    def __init__(self, bus: valkey.Valkey, key: str, ttl_s: float) -> None:
        """`ttl_s`: after so many seconds without `hold` another one may have it."""
        self._bus = bus
        self._key = key
        self._ttl_ms = int(1000 * ttl_s)
        self._own = secrets.token_hex(8).encode()
        self._number = 0

    def hold(self) -> int:
        """Take it, or keep it: the holder's number; 0: another one has it.

        Raises valkey.ValkeyError; then whether it is held is not known.
        """
        holder = cast("bytes | None", self._bus.get(self._key))
        if holder == self._own and self._number:
            # Were it lost between the two, another's time would grow, which is harmless.
            self._bus.pexpire(self._key, self._ttl_ms)
            return self._number
        self._number = 0
        if holder is None:
            self._bus.set(self._key, self._own, px=self._ttl_ms, nx=True)
        if holder in (None, self._own):
            number = self._next_number()
            # Not if it took so long that another one has it by now.
            if self._bus.get(self._key) == self._own:
                self._number = number
        return self._number

    def _next_number(self) -> int:
        """Higher than all before; where the bus has forgotten them, as far as clocks agree."""
        last = cast("bytes | None", self._bus.get(self._key + _NUMBER))
        number = max(int(last or 0) + 1, int(time.time()))
        self._bus.set(self._key + _NUMBER, number)
        return number

    def leave(self) -> None:
        """Let another one have it at once. Raises valkey.ValkeyError."""
        if self._number and self._bus.get(self._key) == self._own:
            self._bus.delete(self._key)
        self._number = 0
