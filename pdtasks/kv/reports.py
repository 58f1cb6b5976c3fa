"""Who waits for a transfer hears of its end at once, and not with the engine's next step.

vLLM hands statistics on with the outputs of a step, which under load is 10 to 200 ms later.  So
each rank says it to a unix datagram socket; what that does not take goes with the statistics.
"""

from __future__ import annotations

import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from pdtasks.kv.plan import TransferRecord

_MOST_BYTES = 4096


class Reporter:
    """A rank's end. For any thread."""

    def __init__(self, path: str) -> None:
        """`path`: of a `Reports` socket."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def __call__(self, record: TransferRecord) -> bool:
        """False when nobody took it."""
        try:
            self._socket.sendto(msgspec.msgpack.encode(record), self._path)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Say nothing more."""
        self._socket.close()


class Reports:
    """The other end."""

    def __init__(self) -> None:
        # A folder of our own: nobody else may say what has been saved.
        self._folder = tempfile.TemporaryDirectory(prefix="pdtasks-")
        self.path = str(Path(self._folder.name) / "reports")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """For `loop.add_reader`."""
        return self._socket.fileno()

    def take(self) -> list[dict[str, Any]]:
        """The fields of all records that have come."""
        records = []
        with suppress(BlockingIOError):
            while True:
                records.append(msgspec.msgpack.decode(self._socket.recv(_MOST_BYTES)))
        return records

    def close(self) -> None:
        """Nobody listens any more."""
        self._socket.close()
        with suppress(OSError):
            Path(self.path).unlink()
        self._folder.cleanup()
