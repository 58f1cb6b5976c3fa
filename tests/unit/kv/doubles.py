"""Stand-ins for the store. They say so in their names."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pdtasks.kv.store import StoreError


class MemoryStore:
    """A `BlockStore` in a dict, which can be made to misbehave."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.num_gets = 0
        self.closed = False
        self.away = False  #: every call fails
        self.may_go_on = threading.Event()  #: cleared: every call waits
        self.may_go_on.set()

    def put(self, key: str, value: memoryview) -> None:
        self._arrive()
        self.puts.append(key)
        self.values[key] = bytes(value)

    def get(self, key: str) -> memoryview | None:
        self.num_gets += 1
        self._arrive()
        value = self.values.get(key)
        return None if value is None else memoryview(value)

    def touch(self, key: str) -> bool:
        self._arrive()
        return key in self.values

    def delete(self, keys: Iterable[str]) -> None:
        self._arrive()
        for key in keys:
            self.values.pop(key, None)

    def close(self) -> None:
        self.closed = True

    def _arrive(self) -> None:
        assert self.may_go_on.wait(10), "a test forgot to let the store go on"
        if self.away:
            raise StoreError("the store is away")
