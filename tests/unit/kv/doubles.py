"""Stand-ins for the store. They say so in their names."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pdtasks.kv.store import StoreError, UnexpectedValue


class MemoryStore:
    """A `BlockStore` in a dict, which can be made to misbehave."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.touched: list[list[str]] = []
        self.num_gets = 0
        self.closed = False
        self.away = False  #: every call fails
        self.broken: set[str] = set()  #: names whose every call fails
        self.under_way: Counter[str] = Counter()  #: calls, by operation
        self.peak: Counter[str] = Counter()  #: the most that were under way at once
        self._held: set[str] = set()
        self._change = threading.Condition()

    def hold(self, *operations: str) -> None:
        """Let calls of these ("put", "get", "touch", "delete") wait."""
        with self._change:
            self._held.update(operations)

    def let_go(self) -> None:
        """Let every call go on."""
        with self._change:
            self._held.clear()
            self._change.notify_all()

    def put(self, key: str, parts: Sequence[memoryview], deadline: float | None = None) -> None:
        with self._call("put", [key], deadline):
            # Read as late as possible: what changes while it is sent is found out.
            value = b"".join(parts)
            with self._change:
                self.puts.append(key)
                self.values[key] = value

    def get(self, key: str, parts: Sequence[memoryview], deadline: float | None = None) -> bool:
        with self._change:
            self.num_gets += 1
        with self._call("get", [key], deadline):
            value = self.values.get(key)
            if value is None:
                return False
            if len(value) != sum(map(len, parts)):
                raise UnexpectedValue(f"{len(value)} bytes under the name of a block")
            for part in parts:
                part[:], value = value[: len(part)], value[len(part) :]
            return True

    def touch(self, keys: Sequence[str]) -> list[bool]:
        with self._change:
            self.touched.append(list(keys))
        with self._call("touch", keys, None):
            return [key in self.values for key in keys]

    def delete(self, keys: Iterable[str]) -> list[str]:
        keys = list(keys)
        with self._call("delete", keys, None):
            return [key for key in keys if self.values.pop(key, None) is None]

    def close(self) -> None:
        self.closed = True

    @contextmanager
    def _call(self, name: str, keys: Sequence[str], deadline: float | None) -> Iterator[None]:
        limit = 10.0 if deadline is None else deadline - time.monotonic()
        with self._change:
            self.under_way[name] += 1
            self.peak[name] = max(self.peak[name], self.under_way[name])
        try:
            with self._change:
                free = self._change.wait_for(lambda: name not in self._held, limit)
            assert free or deadline is not None, "a test forgot to let the store go on"
            if not free:
                raise StoreError("no answer before the deadline")
            if self.away or self.broken.intersection(keys):
                raise StoreError("the store is away")
            yield
        finally:
            with self._change:
                self.under_way[name] -= 1
