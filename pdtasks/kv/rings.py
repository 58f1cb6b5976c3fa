"""The rings of other engines on this host, as one process sees them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from vllm.logger import init_logger

from pdtasks.kv.device_memory import DeviceMemoryError
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.peers import Open, PeerCache
from pdtasks.kv.ring import Presence, RingError, RingReader, has_writer, ring_name, ring_names

logger = init_logger(__name__)

#: Seconds after which a name that was unknown is looked for again.
_LOOK_S = 1.0
#: Seconds for which a ring is kept whose engine has gone, after its last use.
_KEEP_S = 30.0


class Rings:
    """Opens each ring once. For any thread."""

    def __init__(
        self,
        *,
        payloads: bool,
        pin: bool = False,
        open_memory: Open | None = None,
        own_engine: str | None = None,
        on_unreachable: Callable[[], None] = lambda: None,
    ) -> None:
        """See `RingReader`.

        Args:
        open_memory: maps the GPU memory of the engines whose rings they are.
        own_engine: id of the engine that asks: CUDA maps no memory twice in one process.
        on_unreachable: called when another engine's memory cannot be mapped.
        """
        self._payloads = payloads
        self._pin = pin
        self._open_memory = open_memory
        self._own_engine = own_engine
        self._on_unreachable = on_unreachable
        self._is_reached = True  # until one is not
        self._lock = threading.Lock()
        self._closed = False
        self._readers: dict[str, RingReader] = {}
        self._peers: dict[str, PeerCache] = {}
        self._unknown: dict[str, float] = {}  # names, and when they were looked for
        self._used: dict[str, float] = {}  # names, and when last

    def find(self, handle: KVHandle, rank: int) -> RingReader | None:
        """The ring in which `rank` has put the blocks of `handle`; None: not on this host."""
        name = _name_of(handle.ring, rank)
        if name is None:
            return None
        reader = self._readers.get(name)
        if reader is None:
            reader = self._open(name)
        if reader is not None:
            self._used[name] = time.monotonic()
        return reader

    def keep(self, handle: KVHandle, first: int, seconds: float) -> bool:
        """Have the blocks of `handle` from index `first` on stay where `presence` has seen them."""
        for rank in range(handle.tp_size):
            reader = self.find(handle, rank)
            numbers = [handle.number(index) for index in range(first, handle.num_blocks)]
            if reader is None or not reader.keep((n for n in numbers if n is not None), seconds):
                return False
        return True

    def peer(self, ring: RingReader) -> PeerCache | None:
        """The cache of the engine that writes `ring`; None: it cannot be reached."""
        return self._peers.get(ring.name) if self._is_reached else None

    @property
    def has_others(self) -> bool:
        """Is there another engine on this host?"""
        return any(not self._is_own(name) for name in tuple(self._readers))

    def unreachable(self, why: Exception) -> None:
        """What one engine's memory says of it holds for all: nobody's is read any more."""
        if self._is_reached:
            self._is_reached = False
            logger.warning("no copies from GPU to GPU: hand-overs go through host memory (%s)", why)
            self._on_unreachable()

    def are_cached(self, handle: KVHandle, first: int) -> bool:
        """Are the blocks of `handle` from index `first` on in caches that this engine reads?"""
        for rank in range(handle.tp_size):
            reader, own = self.find(handle, rank), self._own(rank)
            if reader is None or own is None or own is reader or not own.reaches_others:
                return False
            numbers = [handle.number(index) for index in range(first, handle.num_blocks)]
            if any(n is None or reader.cached_at(n) is None for n in numbers):
                return False
        return True

    def _own(self, rank: int) -> RingReader | None:
        name = _name_of(self._own_engine, rank)
        return None if name is None else self._readers.get(name) or self._open(name)

    def _is_own(self, name: str) -> bool:
        return name.rpartition("-")[0] == (_name_of(self._own_engine, 0) or "").rpartition("-")[0]

    def presence(self, handle: KVHandle, first: int) -> Presence:
        """Of the blocks of `handle` from index `first` on; GONE: one of them is not here."""
        found = Presence.HERE
        for rank in range(handle.tp_size):
            reader = self.find(handle, rank)
            if reader is None:
                return Presence.GONE
            for index in range(first, handle.num_blocks):
                number = handle.number(index)
                if number is None:
                    return Presence.GONE
                presence = reader.presence(number)
                if presence is Presence.GONE:
                    return presence
                if presence is Presence.NOT_YET:
                    found = presence
        return found

    def look(self) -> None:
        """Open what has come since, and let go of what has gone: nobody has to wait for it then."""
        names = ring_names()
        for name in names - self._readers.keys():
            self._open(name)
        for name in list(self._peers):
            if not has_writer(name):
                self._let_go(name)
        now = time.monotonic()
        gone = self._readers.keys() - names
        self._close([name for name in gone if now - self._used.get(name, 0.0) > _KEEP_S])

    def close(self) -> None:
        """Let go of all, for ever."""
        self._closed = True
        self._close(list(self._readers))

    def _open(self, name: str) -> RingReader | None:
        with self._lock:
            if name in self._readers or self._closed:
                return self._readers.get(name)
            now = time.monotonic()
            if now - self._unknown.get(name, -_LOOK_S) < _LOOK_S:
                return None
            try:
                reader = RingReader(name, payloads=self._payloads, pin=self._pin)
            except RingError as exc:
                logger.debug("ring %s: %s", name, exc)
                self._unknown = {n: t for n, t in self._unknown.items() if now - t < _LOOK_S}
                self._unknown[name] = now
                return None
            self._map_cache(reader)
            self._readers[name] = reader
            return reader

    def _map_cache(self, reader: RingReader) -> None:
        if self._open_memory is None or not self._is_reached or not reader.regions:
            return
        # Of one that is gone nothing is mapped: see `peers`.
        if self._is_own(reader.name) or not has_writer(reader.name):
            return
        try:
            self._peers[reader.name] = PeerCache(reader.regions, self._open_memory)
        except DeviceMemoryError as exc:
            if has_writer(reader.name):  # else it has ended meanwhile
                self.unreachable(exc)

    def _let_go(self, name: str) -> None:
        """Of the cache of an engine; what is in its ring can still be read."""
        if peer := self._peers.pop(name, None):
            peer.close()

    def _close(self, names: Iterable[str]) -> None:
        names = list(names)
        for name in names:
            self._let_go(name)
        with self._lock:
            for name in names:
                self._used.pop(name, None)
                if reader := self._readers.pop(name, None):
                    reader.close()


def _name_of(engine_id: str | None, rank: int) -> str | None:
    """`ring_name`; None of what has no ring."""
    try:
        return None if engine_id is None else ring_name(engine_id, rank)
    except ValueError:
        return None
