"""Which workers of this host's stack stay away? A file with its name says so of each.

Asked by the supervisor, told by `pdtasks drain` and `restart`, and by a worker that was asked over
the bus (`pdtasks.bus.draining`).
"""

from __future__ import annotations

from pathlib import Path


class Drained:
    """Those of the stack in one home."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "drained"

    def add(self, name: str) -> None:
        """`name` is not started again."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        (self._folder / name).touch()

    def discard(self, name: str) -> None:
        """`name` may be started again."""
        (self._folder / name).unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return (self._folder / name).exists()

    def clear(self) -> None:
        """For a stack that begins."""
        if self._folder.is_dir():
            for file in self._folder.iterdir():
                file.unlink(missing_ok=True)
