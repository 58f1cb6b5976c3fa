"""Where do the files of batches lie? On the bus, in pieces: all API processes share no other place.

A local disk would be one host's, and an API process that is replaced comes back on another; Valkey
is there already, with rights, a bound of its memory and expiry.  What it costs is memory, and so
files have a share of it, and an end.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final, Self

import valkey.asyncio

from pdtasks.bus import keys
from pdtasks.bus.records import Records, Unreadable, of_a_kind
from pdtasks.bus.scripts import flat, script
from pdtasks.errors import NoRoomForFiles
from pdtasks.messages import Count

#: Of every piece of an uploaded file but the last.
PIECE_BYTES: Final = 1 << 20
#: Part of the bus's memory that may be full when a piece of a file comes in.
_MOST_MEMORY: Final = 0.5
#: Seconds that a piece is kept whose file is not whole.
_ON_ITS_WAY_S: Final = 1800
_JSON: Final = frozenset({"bytes", "parts", "created_at", "expires_at"})


@dataclass(frozen=True)
class File:
    """One file that is whole."""

    id: str
    filename: str
    purpose: str
    bytes: Count
    parts: Count  #: pieces
    created_at: Count
    expires_at: Count
    owner: str = ""  #: the name of the API key that it came with


class FileInUse(Exception):
    """A batch reads it."""

    def __init__(self, batch_id: str) -> None:
        super().__init__(batch_id)
        self.batch_id = batch_id


class FileStore:
    """All files on one bus. Every method raises what is in `pdtasks.bus.connection.BUS_ERRORS`."""

    def __init__(self, bus: valkey.asyncio.Valkey, *, ttl_s: int) -> None:
        """`ttl_s`: seconds that a file is kept, at most."""
        self.ttl_s = ttl_s
        self._bus = bus
        self._records = Records(
            bus,
            File,
            key=lambda file_id: keys.FILE + file_id,
            is_id=is_file_id,
            json_fields=_JSON,
        )
        self._keep = script(bus, "file_keep")
        self._delete = script(bus, "file_delete")
        self._put = script(bus, "file_put")

    def upload(self) -> Upload:
        """A file that is on its way: nobody sees it until it is kept."""
        return Upload(self._bus, self._put, self._keep)

    async def require_room(self, num_bytes: int) -> None:
        """Raises NoRoomForFiles when so many would not fit; who may not ask is told later."""
        try:
            memory = await self._bus.info("memory")
        except valkey.exceptions.NoPermissionError:
            return
        if memory["maxmemory"] and (
            memory["used_memory"] + num_bytes > memory["maxmemory"] * _MOST_MEMORY
        ):
            raise _no_room()

    async def get(self, file_id: str) -> File | None:
        """The file, or None when there is none (any more). Raises Unreadable."""
        return await self._records.get(file_id)

    async def newest(
        self,
        *,
        limit: int,
        after: str | None,
        owner: str = "",
        purpose: str | None = None,
        oldest_first: bool = False,
    ) -> tuple[list[File], bool] | None:
        """Files, and whether there are more; None when there is no file `after`."""
        return await self._records.page(
            keys.FILES,
            limit=limit,
            after=after,
            owner=owner,
            oldest_first=oldest_first,
            wanted=lambda file: purpose in (None, file.purpose),
        )

    async def delete(self, file_id: str) -> bool:
        """False: there is none (any more). Raises FileInUse."""
        with of_a_kind():
            done: bytes = await self._delete(
                keys=[keys.FILE + file_id, keys.FILES], args=[file_id, keys.BATCH]
            )
        if done not in (b"deleted", b"gone"):
            raise FileInUse(done.decode())
        return done == b"deleted"

    async def pieces(self, file: File) -> AsyncIterator[bytes]:
        """All of it, in order. Raises Unreadable when it is deleted meanwhile."""
        for part in range(file.parts):
            with of_a_kind():
                piece = await self._bus.get(f"{keys.FILE}{file.id}:{part}")
            if piece is None:
                raise Unreadable("a piece of the file is gone")
            yield piece

    async def read(self, file_id: str, offset: int, length: int) -> bytes:
        """A part of an uploaded file. Raises Unreadable when it is not there."""
        found = b""
        for part in range(offset // PIECE_BYTES, (offset + length - 1) // PIECE_BYTES + 1):
            begin = offset + len(found) - part * PIECE_BYTES
            end = min(offset + length - part * PIECE_BYTES, PIECE_BYTES) - 1
            with of_a_kind():
                found += await self._bus.getrange(f"{keys.FILE}{file_id}:{part}", begin, end)
        if len(found) != length:
            raise Unreadable("a piece of the file is gone")
        return found


class Upload:
    """A file on its way; dropped on leaving, unless it was kept."""

    def __init__(self, bus: valkey.asyncio.Valkey, put: Any, keep: Any) -> None:
        self.id = f"file-{uuid.uuid4().hex}"
        self.num_bytes = 0
        self._bus, self._put, self._keep = bus, put, keep
        self._rest = bytearray()
        self._parts = 0
        self._is_kept = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._is_kept and self._parts:
            await self._bus.unlink(*(self._piece(part) for part in range(self._parts)))

    async def write(self, data: bytes | bytearray) -> None:
        """Append `data`. Raises NoRoomForFiles."""
        self.num_bytes += len(data)
        self._rest += data
        while len(self._rest) >= PIECE_BYTES:
            await self._send(bytes(self._rest[:PIECE_BYTES]))
            del self._rest[:PIECE_BYTES]

    async def keep(self, *, filename: str, purpose: str, owner: str, ttl_s: int) -> File:
        """It is whole: it is there from now on. Raises NoRoomForFiles."""
        if self._rest:
            await self._send(bytes(self._rest))
            self._rest.clear()
        now = int(time.time())
        file = File(
            id=self.id,
            filename=filename,
            purpose=purpose,
            bytes=self.num_bytes,
            parts=self._parts,
            created_at=now,
            expires_at=now + ttl_s,
            owner=owner,
        )
        fields = {name: value for name, value in vars(file).items() if name != "id"}
        is_whole = await self._keep(
            keys=[keys.FILE + self.id, keys.FILES],
            args=[self.id, ttl_s, self._parts, *flat(fields)],
        )
        if not is_whole:
            raise Unreadable("a piece of the file was lost on its way")
        self._is_kept = True
        return file

    async def _send(self, piece: bytes) -> None:
        # Counted first: what is not known to have arrived is deleted as well.
        self._parts += 1
        has_room = await self._put(
            keys=[self._piece(self._parts - 1)], args=[piece, _ON_ITS_WAY_S, _MOST_MEMORY]
        )
        if not has_room:
            raise _no_room()

    def _piece(self, part: int) -> str:
        return f"{keys.FILE}{self.id}:{part}"


def is_file_id(text: str) -> bool:
    """Could a file be called so?"""
    return re.fullmatch(r"file-[0-9a-f]{32}", text) is not None


def _no_room() -> NoRoomForFiles:
    return NoRoomForFiles(
        "files, jobs and results fill half of the bus's memory: delete files, wait until some have "
        "expired, or give the bus more memory"
    )
