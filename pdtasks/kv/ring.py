"""Blocks in memory that all engines of a host can read: the fast way beside the store.

Theory of operation
-------------------
Each engine rank that saves owns one ring, a file in shared memory with a fixed number of slots, and
is the only one that writes it.  The scheduler numbers blocks as it plans them: block *n* lies in
slot *n* mod slots until block *n* + slots takes its place.  A prompt's handle names ring and
numbers, so nobody keeps a directory, and no lock is shared between processes::

    header   magic 4s | format u16 | regions u16 | slots u64 | block bytes u64 | reaches u64
             padding to 64
    regions  of the writer's cache, rows of 128 bytes:
             handle 64s | offset u64 | bytes from one block to the next u64 | padding
    table    a row of 64 bytes for each slot:
             word u64 | name u64 | read u64 | kept until u64 | cached u64
    payload  of each slot, rows of whole pages

A slot's word is *n* + 1 when block *n* is there, 0 while one is being written.  So a reader knows
without asking anybody: a smaller word than that of its block says "not yet", a larger one "not any
more".  It looks at word and name, copies, and looks at the word again, which tells whether the
slot was written meanwhile (a sequence lock).  The name says which content the block has; there is
no checksum of its bytes, unlike in the store: they cross no wire, and two passes over each block
would take longer than moving it.

A reader leaves *n* + 1 in `read`.  Nothing depends on it: a writer whose slots are all waiting for
a slow store gives up sending a block that was read before one that nobody has read yet.

A scheduler that lets a step depend on a block writes into `kept until` (nanoseconds of the host's
monotonic clock) how long its slot must stay as it is, and then looks at the word again; the writer
takes the word away and then looks there, and waits.  Whichever comes first, the other sees it
(Dekker's algorithm; the locks between write and look are the fences that it needs).

On CUDA a block is in the writer's own cache as well, until the engine writes another one there:
`cached` is the number of that place, and 1.  The writer takes it away before a step that writes
there begins.  Engines of the host that can map the cache (`peers`) copy from GPU to GPU: 2 ms
instead of 19 for 663 MB between two H200.  A copy in which `cached` has changed is made again from
the slot; nothing is ever kept in the cache for a reader.  `reaches` is 1 as long as the engine that
writes this ring can read others' caches: its scheduler looks there.

The writer holds a file lock as long as it lives.  What it leaves when it is killed can still be
read by those who know its name, until another ring is made here: that removes files without a lock.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path

import torch

from pdtasks.kv.device_memory import HANDLE_BYTES, SharedRegion

#: Where files are memory.
FOLDER = Path("/dev/shm")  # noqa: S108 - shared memory, not a temporary file
_PREFIX = "pdtasks-kv-"
_NAME = re.compile(re.escape(_PREFIX) + "[0-9A-Za-z_.-]{1,100}")
_HEADER = struct.Struct("=4sHHQQQ")
_MAGIC = b"PDRB"
_FORMAT = 3
_REACHES = struct.Struct("=Q")
_REACHES_BEGIN = _HEADER.size - _REACHES.size
_REGION = struct.Struct(f"={HANDLE_BYTES}sQQ")
_REGIONS_BEGIN = 64
_REGION_ROW = 128
_MOST_REGIONS = 1024
_ROW = 64  # bytes of a slot's row
_NAME_WORD, _READ, _KEPT, _CACHED = 1, 2, 3, 4  # of a row
_PAGE = 4096
_MADV_HUGEPAGE = 14
#: Seconds between two looks at what others have read.
_LOOK_S = 0.002


class RingError(Exception):
    """A ring could not be made, or what lies under its name is none."""


class Presence(Enum):
    """Where is a block?"""

    NOT_YET = auto()
    HERE = auto()
    GONE = auto()


def ring_name(engine_id: str, rank: int) -> str:
    """Of the ring of `rank` of an engine. Raises ValueError for what cannot be a file's name."""
    name = f"{_PREFIX}{engine_id}-{rank}"
    if not _NAME.fullmatch(name):
        raise ValueError("no engine's name")
    return name


def ring_names() -> set[str]:
    """Of all rings on this host."""
    return {path.name for path in FOLDER.glob(f"{_PREFIX}*")}


def is_there(name: str) -> bool:
    """Is there a ring of that name on this host?"""
    return (FOLDER / name).exists()


class _Mapped:
    """A ring's file in this process's memory."""

    pinned = False  #: does CUDA know it?

    def __init__(self, fd: int, length: int) -> None:
        self._memory = mmap.mmap(fd, length)
        self._view = memoryview(self._memory)
        magic, version, num_regions, num_slots, block_bytes, _ = _HEADER.unpack_from(self._view)
        self.num_slots = int(num_slots)
        self.block_bytes = int(block_bytes)
        if magic != _MAGIC or version != _FORMAT:
            raise RingError("not a ring of this release")
        #: Of the writer's cache; none: it is in no memory that others can read.
        self.regions = [
            SharedRegion(*_REGION.unpack_from(self._view, _REGIONS_BEGIN + index * _REGION_ROW))
            for index in range(num_regions)
        ]
        self._stride = -(-self.block_bytes // _PAGE) * _PAGE
        begin = _table_begin(num_regions)
        self._payloads_begin = _payload_begin(num_regions, self.num_slots)
        table = self._view[begin : begin + self.num_slots * _ROW]
        # One machine word each: written and read whole.
        self._words = table.cast("Q")

    def word(self, slot: int) -> int:
        """The number of the block in `slot`, and 1; 0 while there is none."""
        return int(self._words[slot * (_ROW // 8)])

    def name_of(self, slot: int) -> int:
        """The name of the block in `slot`."""
        return int(self._words[slot * (_ROW // 8) + _NAME_WORD])

    def was_read(self, slot: int) -> bool:
        """Has another engine read the block in `slot`?"""
        row = slot * (_ROW // 8)
        return 0 != self._words[row] == self._words[row + _READ]

    def payload(self, slot: int) -> memoryview:
        """The bytes of the block in `slot`."""
        begin = self._payloads_begin + slot * self._stride
        return self._view[begin : begin + self.block_bytes]

    def is_kept(self, slot: int) -> bool:
        """Does a step depend on what is in `slot`?"""
        return int(self._words[slot * (_ROW // 8) + _KEPT]) > time.monotonic_ns()

    @property
    def reaches_others(self) -> bool:
        """Can the engine that writes it read other engines' caches?"""
        return bool(_REACHES.unpack_from(self._view, _REACHES_BEGIN)[0])

    def cached_at(self, number: int) -> int | None:
        """The place of block `number` in the writer's cache; None: it is not there any more."""
        row = number % self.num_slots * (_ROW // 8)
        # Twice: between two looks the row may become another block's.
        if self._words[row] != number + 1:
            return None
        cached = int(self._words[row + _CACHED])
        return cached - 1 if cached and self._words[row] == number + 1 else None

    def presence(self, number: int) -> Presence:
        """Where block `number` is."""
        if number < 0:
            return Presence.GONE
        word = self.word(number % self.num_slots)
        if word == number + 1:
            return Presence.HERE
        return Presence.GONE if word > number + 1 else Presence.NOT_YET


class RingWriter(_Mapped):
    """The ring of this rank. For several threads, each with slots of its own."""

    def __init__(
        self,
        name: str,
        *,
        num_bytes: int,
        block_bytes: int,
        pin: bool,
        regions: Sequence[SharedRegion] = (),
    ) -> None:
        """Make it.

        Args:
        num_bytes: of memory for payloads.
        pin: let CUDA copy to and from it at full speed.
        regions: of the engine's cache, where others can read it.

        Raises RingError, saying what to do, when there is no room for `num_bytes`.
        """
        self.name = name
        self._path = FOLDER / name
        stride = -(-block_bytes // _PAGE) * _PAGE
        num_slots = num_bytes // stride
        if num_slots < 2:
            raise RingError(
                f"{num_bytes / 2**20:.0f} MiB have no room for two blocks of "
                f"{block_bytes / 2**20:.1f} MiB: set PDTASKS_KV_RING_MIB higher"
            )
        sweep()
        if len(regions) > _MOST_REGIONS:
            regions = ()
        length = _payload_begin(len(regions), num_slots) + num_slots * stride
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as exc:
            raise RingError(f"{FOLDER} cannot be written ({exc.strerror})") from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # All of it now: a host that lacks it says so here, and not by SIGBUS later.
            os.posix_fallocate(self._fd, 0, length)
            for index, region in enumerate(regions):
                os.pwrite(self._fd, _REGION.pack(*region), _REGIONS_BEGIN + index * _REGION_ROW)
            header = _HEADER.pack(
                _MAGIC, _FORMAT, len(regions), num_slots, block_bytes, bool(regions)
            )
            os.pwrite(self._fd, header, 0)
            super().__init__(self._fd, length)
        except OSError as exc:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            raise RingError(
                f"{FOLDER} has no room for {length / 2**20:.0f} MiB ({exc.strerror}): set "
                "PDTASKS_KV_RING_MIB lower, or give a container more (--shm-size, --ipc=host)"
            ) from exc
        with suppress(OSError, ValueError):  # where the host allows it for shared memory
            self._memory.madvise(_MADV_HUGEPAGE)
        self.pinned = pin and _pin(self._view)
        self._changed = threading.Condition()
        self._busy: set[int] = set()  # slots that are written, or still to be sent to the store
        self._places = threading.Lock()
        self._slots_at: dict[int, set[int]] = {}  # whose blocks are cached there, by place
        self._place_of: dict[int, int] = {}  # the other way round

    def take(
        self, number: int, deadline: float, give_up: Callable[[int], bool] = lambda _: False
    ) -> int | None:
        """The slot for block `number`, to be given back with `release`.

        Waits for what still has to leave it for the store; None: not by `deadline` (monotonic).
        `give_up` is asked again and again whether that need not leave any more; it says so to one
        caller alone, who has the slot then.
        """
        slot = number % self.num_slots
        while True:
            with self._changed:
                if slot not in self._busy:
                    self._busy.add(slot)
                    break
            if give_up(slot):
                break  # it stays busy, for us
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            with self._changed:
                # Readers are in other processes and wake nobody here.
                self._changed.wait_for(lambda: slot not in self._busy, min(left, _LOOK_S))
        self._words[slot * (_ROW // 8)] = 0
        with self._places:
            self._is_not_cached(slot)
        with self._changed:
            pass  # a fence: the word is gone for all before we look who keeps the slot
        while self.is_kept(slot):
            if time.monotonic() >= deadline:
                self.release(slot)
                return None
            time.sleep(_LOOK_S)
        return slot

    def publish(self, slot: int, number: int, name: int, place: int | None = None) -> None:
        """Block `number` is in `slot` now.

        Args:
        name: 64 bits that say what it contains.
        place: where it is in the engine's cache, too, until `forget`.
        """
        row = slot * (_ROW // 8)
        self._words[row + _NAME_WORD] = name
        if place is not None and self.regions:
            with self._places:
                self._slots_at.setdefault(place, set()).add(slot)
                self._place_of[slot] = place
                self._words[row + _CACHED] = place + 1
        self._words[row] = number + 1

    def forget(self, places: Collection[int]) -> None:
        """These of the engine's cache are about to be written: their blocks are there no more."""
        if not self.regions:
            return
        with self._places:
            for place in places:
                for slot in tuple(self._slots_at.get(place, ())):
                    self._is_not_cached(slot)

    def _is_not_cached(self, slot: int) -> None:
        """What `slot` has is in the cache no more. Called with `_places`."""
        self._words[slot * (_ROW // 8) + _CACHED] = 0
        place = self._place_of.pop(slot, None)
        if place is not None:
            slots = self._slots_at[place]
            slots.discard(slot)
            if not slots:
                del self._slots_at[place]

    def reaches_no_more(self) -> None:
        """This engine cannot read other engines' caches after all."""
        _REACHES.pack_into(self._view, _REACHES_BEGIN, 0)

    def release(self, slot: int) -> None:
        """Another block may take the place of what is in `slot`."""
        with self._changed:
            self._busy.discard(slot)
            self._changed.notify_all()

    def close(self) -> None:
        """Remove it; those who read it go on with what they have."""
        self._path.unlink(missing_ok=True)
        if self.pinned:
            _unpin(self._view)
        os.close(self._fd)


class RingReader(_Mapped):
    """The ring of another engine, or of this one."""

    def __init__(self, name: str, *, payloads: bool = True, pin: bool = False) -> None:
        """Args:
        payloads: False: only the table is mapped, to see what is there.
        pin: see `RingWriter`.

        Raises RingError: no such ring on this host, or one that is not ours to read.
        """
        if not _NAME.fullmatch(name):
            raise RingError("not the name of a ring")
        self.name = name
        try:
            fd = os.open(FOLDER / name, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as exc:
            raise RingError(f"no ring of that name here ({exc.strerror})") from exc
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or found.st_size < _HEADER.size:
                raise RingError("not a ring of this user")
            header = os.pread(fd, _HEADER.size, 0)
            _, _, num_regions, num_slots, block_bytes, _ = _HEADER.unpack(header)
            length = _payload_begin(num_regions, num_slots)
            if payloads:
                length += num_slots * -(-block_bytes // _PAGE) * _PAGE
            if length > found.st_size:
                raise RingError("a ring that is not complete")
            super().__init__(fd, length)
        except (OSError, ValueError, struct.error) as exc:
            raise RingError(f"it cannot be read ({type(exc).__name__})") from exc
        finally:
            os.close(fd)
        self.pinned = pin and _pin(self._view)
        self._fence = threading.Lock()

    def keep(self, numbers: Iterable[int], seconds: float) -> bool:
        """Have these blocks stay where they are; False: one of them is not there any more."""
        numbers = list(numbers)
        until = time.monotonic_ns() + int(seconds * 1e9)
        for number in numbers:
            self._words[number % self.num_slots * (_ROW // 8) + _KEPT] = until
        with self._fence:
            pass  # all see it before we look
        return all(self.presence(number) is Presence.HERE for number in numbers)

    def note_read(self, number: int) -> None:
        """This process has block `number`: nothing depends on its slot any more."""
        row = number % self.num_slots * (_ROW // 8)
        self._words[row + _READ] = number + 1
        self._words[row + _KEPT] = 0

    def close(self) -> None:
        """Let go of it."""
        if self.pinned:
            _unpin(self._view)


def sweep() -> None:
    """Remove the rings whose writers are gone."""
    for name in ring_names():
        if not has_writer(name):
            (FOLDER / name).unlink(missing_ok=True)


def has_writer(name: str) -> bool:
    """Does the process live that writes this ring, or is just making it?"""
    try:
        fd = os.open(FOLDER / name, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # another user's
    try:
        if os.fstat(fd).st_size:  # else it is being made
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except OSError:
        pass
    finally:
        os.close(fd)
    return True


def _table_begin(num_regions: int) -> int:
    return _REGIONS_BEGIN + num_regions * _REGION_ROW


def _payload_begin(num_regions: int, num_slots: int) -> int:
    return -(-(_table_begin(num_regions) + num_slots * _ROW) // _PAGE) * _PAGE


def _pin(view: memoryview) -> bool:
    from vllm.v1.kv_offload.cpu.host_register import host_register

    return host_register(_address(view), len(view))


def _unpin(view: memoryview) -> None:
    from vllm.v1.kv_offload.cpu.host_register import host_unregister

    host_unregister(_address(view))


def _address(view: memoryview) -> int:
    return int(torch.frombuffer(view, dtype=torch.int8).data_ptr())
