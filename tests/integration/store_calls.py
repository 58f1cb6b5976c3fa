"""How does a test call a block store? With plain bytes."""

from __future__ import annotations

from collections.abc import Callable

from pdtasks.kv.store import BlockStore

MakeStore = Callable[..., BlockStore]
MIB = 1 << 20
BLOCK = bytes(range(256)) * 4096  # 1 MiB


def put(store: BlockStore, key: str, *values: bytes) -> None:
    """Store `values`, one after the other, as one value."""
    store.put(key, [memoryview(value) for value in values])


def get(store: BlockStore, key: str, *sizes: int) -> bytes | None:
    """The value, whose length is the sum of `sizes`."""
    parts = [memoryview(bytearray(size)) for size in sizes]
    return b"".join(parts) if store.get(key, parts) else None


def has(store: BlockStore, key: str) -> bool:
    """Is it there? (It is used by that.)"""
    return store.touch([key]) == [True]


def calls(store: BlockStore) -> list[Callable[[], object]]:
    """One of each."""
    return [
        lambda: get(store, "pd:kv:a", 1),
        lambda: store.touch(["pd:kv:a"]),
        lambda: put(store, "pd:kv:a", b"x"),
        lambda: store.delete(["pd:kv:a"]),
    ]
