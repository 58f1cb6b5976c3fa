"""The cache of another engine, in GPU memory that this process has mapped.

As long as it is mapped the GPU keeps that memory, also when its engine is gone: the next one that
is started there would find no room.  So it is let go of as soon as the engine is seen to be gone
(`Rings.look`), but not in the middle of a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from pdtasks.kv.device_memory import DeviceMemory, SharedRegion

#: Maps an allocation by its handle. Raises DeviceMemoryError.
Open = Callable[[bytes], DeviceMemory]

#: Seconds that a copy may take.
_COPY_S = 5.0


class PeerCache:
    """Where the rows of another engine's cache lie in this process. For any thread."""

    def __init__(self, regions: Sequence[SharedRegion], open_memory: Open) -> None:
        """Map it. Raises DeviceMemoryError."""
        self._memory: dict[bytes, DeviceMemory] = {}
        self._rows: NDArray[np.int64] | None = None
        self._idle = threading.Condition()
        self._num_users = 0
        try:
            for region in regions:
                # Regions of one allocation: CUDA maps none twice.
                if region.handle not in self._memory:
                    self._memory[region.handle] = open_memory(region.handle)
        except Exception:
            self.close()
            raise
        begins = [self._memory[r.handle].address + r.offset for r in regions]
        self._rows = np.array([begins, [r.stride for r in regions]], dtype=np.int64)

    @contextmanager
    def use(self) -> Iterator[NDArray[np.int64] | None]:
        """Keep it mapped meanwhile.

        Yields int64 of shape (2, regions): address of row 0, bytes from one row to the next; None
        when it was let go of.
        """
        with self._idle:
            rows = self._rows
            self._num_users += 1
        try:
            yield rows
        finally:
            with self._idle:
                self._num_users -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Let go of it, when nobody copies from it."""
        with self._idle:
            self._rows = None
            if not self._idle.wait_for(lambda: not self._num_users, _COPY_S):
                return  # something hangs: unmapped below it, the engine would end
            memory, self._memory = self._memory, {}
        for allocation in memory.values():
            allocation.close()
