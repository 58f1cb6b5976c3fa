"""Blocks in memory that all engines of a host can read: the fast way beside the store.

Theory of operation
-------------------
Each engine rank that saves owns one ring, a file in shared memory with a fixed number of slots, and
is the only one that writes it.  The scheduler numbers blocks as it plans them: block *n* lies in
slot *n* mod slots until block *n* + slots takes its place.  A prompt's handle names ring and
numbers, so nobody keeps a directory, and no lock is shared between processes::

    header   magic 4s | format u16 | reserved u16 | slots u64 | block bytes u64 | padding to 64
             device handle 64s | device slots u64 | padding to 192
    table    a row of 64 bytes for each slot:
             word u64 | name u64 | read u64 | kept until u64 | device word u64
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

On CUDA the newest blocks are in the writer's GPU memory as well, block *n* in device slot *n* mod
device slots, whose device word is *n* + 1 then.  Engines of the host that can map that memory copy
from GPU to GPU: 2 ms instead of 19 for 663 MB between two H200.  A copy in which the device word
has changed is made again from the slot; nothing is ever kept in a device slot.

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
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path

import torch

from pdtasks.kv.device_memory import HANDLE_BYTES, DeviceMemory

#: Where files are memory.
FOLDER = Path("/dev/shm")  # noqa: S108 - shared memory, not a temporary file
_PREFIX = "pdtasks-kv-"
_NAME = re.compile(re.escape(_PREFIX) + "[0-9A-Za-z_.-]{1,100}")
_HEADER = struct.Struct("=4sHHQQ")
_MAGIC = b"PDRB"
_FORMAT = 2
_DEVICE = struct.Struct(f"={HANDLE_BYTES}sQ")
_DEVICE_BEGIN = 64
_TABLE = 192  # bytes before the table
_ROW = 64  # bytes of a slot's row
_NAME_WORD, _READ, _KEPT, _DEVICE_WORD = 1, 2, 3, 4  # of a row
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
    device: DeviceMemory | None = None  #: where the newest blocks are as well

    def __init__(self, fd: int, length: int) -> None:
        self._memory = mmap.mmap(fd, length)
        self._view = memoryview(self._memory)
        magic, version, _, num_slots, block_bytes = _HEADER.unpack_from(self._view)
        self.num_slots = int(num_slots)
        self.block_bytes = int(block_bytes)
        if magic != _MAGIC or version != _FORMAT:
            raise RingError("not a ring of this release")
        self._stride = -(-self.block_bytes // _PAGE) * _PAGE
        table = self._view[_TABLE : _TABLE + self.num_slots * _ROW]
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
        begin = _payload_begin(self.num_slots) + slot * self._stride
        return self._view[begin : begin + self.block_bytes]

    def is_kept(self, slot: int) -> bool:
        """Does a step depend on what is in `slot`?"""
        return int(self._words[slot * (_ROW // 8) + _KEPT]) > time.monotonic_ns()

    @property
    def device_handle(self) -> bytes | None:
        """Of the memory where the newest blocks are as well; None: they are not."""
        handle, num_slots = _DEVICE.unpack_from(self._view, _DEVICE_BEGIN)
        return handle if num_slots else None

    def device_slot(self, number: int) -> int | None:
        """The device slot for block `number`; None: there are none."""
        _, num_slots = _DEVICE.unpack_from(self._view, _DEVICE_BEGIN)
        return number % num_slots if num_slots else None

    def is_in_device(self, number: int) -> bool:
        """Is block `number` in its device slot?"""
        slot = self.device_slot(number)
        return slot is not None and self._words[slot * (_ROW // 8) + _DEVICE_WORD] == number + 1

    def without_device(self) -> None:
        """Its memory cannot be written, or reached: no engine counts on it any more."""
        handle = self.device_handle
        if handle is not None:
            _DEVICE.pack_into(self._view, _DEVICE_BEGIN, handle, 0)

    def device_address(self, slot: int) -> int:
        """Of a device slot, in this process."""
        assert self.device is not None
        return self.device.address + slot * device_stride(self.block_bytes)

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
        device: DeviceMemory | None = None,
        num_device_slots: int = 0,
    ) -> None:
        """Make it.

        Args:
        num_bytes: of memory for payloads.
        pin: let CUDA copy to and from it at full speed.
        device: has room for `num_device_slots` blocks (`device_stride`); goes with the ring.

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
        length = _payload_begin(num_slots) + num_slots * stride
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as exc:
            raise RingError(f"{FOLDER} cannot be written ({exc.strerror})") from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # All of it now: a host that lacks it says so here, and not by SIGBUS later.
            os.posix_fallocate(self._fd, 0, length)
            header = _HEADER.pack(_MAGIC, _FORMAT, 0, num_slots, block_bytes)
            os.pwrite(self._fd, header, 0)
            if device is not None:
                # A device slot's word is in the row of a slot.
                num_device_slots = min(num_device_slots, num_slots)
                there = _DEVICE.pack(device.handle, num_device_slots)
                os.pwrite(self._fd, there, _DEVICE_BEGIN)
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
        self.device = device
        self._filling: set[int] = set()  # device slots
        self._changed = threading.Condition()
        self._busy: set[int] = set()  # slots that are written, or still to be sent to the store

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
        with self._changed:
            pass  # a fence: the word is gone for all before we look who keeps the slot
        while self.is_kept(slot):
            if time.monotonic() >= deadline:
                self.release(slot)
                return None
            time.sleep(_LOOK_S)
        return slot

    def publish(self, slot: int, number: int, name: int) -> None:
        """Block `number` is in `slot` now. `name`: 64 bits that say what it contains."""
        self._words[slot * (_ROW // 8) + _NAME_WORD] = name
        self._words[slot * (_ROW // 8)] = number + 1

    def take_in_device(self, number: int) -> int | None:
        """The device slot for block `number`, for `publish_in_device`.

        None: there is none, or another block is being written there.
        """
        slot = self.device_slot(number)
        with self._changed:
            if slot is None or slot in self._filling:
                return None
            self._filling.add(slot)
        self._words[slot * (_ROW // 8) + _DEVICE_WORD] = 0
        return slot

    def publish_in_device(self, slot: int, number: int | None) -> None:
        """Block `number` is in the device slot now; None: there is none in it."""
        if number is not None:
            self._words[slot * (_ROW // 8) + _DEVICE_WORD] = number + 1
        with self._changed:
            self._filling.discard(slot)

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
        if self.device is not None:
            self.device.close()
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
        try:
            fd = os.open(FOLDER / name, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as exc:
            raise RingError(f"no ring of that name here ({exc.strerror})") from exc
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or found.st_size < _TABLE:
                raise RingError("not a ring of this user")
            header = os.pread(fd, _HEADER.size, 0)
            _, _, _, num_slots, block_bytes = _HEADER.unpack(header)
            length = _payload_begin(num_slots)
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
        if self.device is not None:
            self.device.close()
        if self.pinned:
            _unpin(self._view)


def sweep() -> None:
    """Remove the rings whose writers are gone."""
    for name in ring_names():
        path = FOLDER / name
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_size:  # else it is being made
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(fd)


def device_stride(block_bytes: int) -> int:
    """Bytes from one device slot to the next."""
    return -(-block_bytes // _ROW) * _ROW


def _payload_begin(num_slots: int) -> int:
    return -(-(_TABLE + num_slots * _ROW) // _PAGE) * _PAGE


def _pin(view: memoryview) -> bool:
    from vllm.v1.kv_offload.cpu.host_register import host_register

    return host_register(_address(view), len(view))


def _unpin(view: memoryview) -> None:
    from vllm.v1.kv_offload.cpu.host_register import host_unregister

    host_unregister(_address(view))


def _address(view: memoryview) -> int:
    return int(torch.frombuffer(view, dtype=torch.int8).data_ptr())
