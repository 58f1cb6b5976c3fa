"""The threads that move blocks, each with what moving needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pdtasks.kv.codec import HEADER_BYTES
from pdtasks.kv.marks import Marks
from pdtasks.kv.pages import BlockPages, Copier, ManyCopies, Staging
from pdtasks.kv.plan import BlockLoad, BlockSave


@dataclass(frozen=True)
class Block:
    """One block's way."""

    key: str
    content: str  #: what its checksum is seeded with
    shared: bool  #: named by content: what is in the store is this block
    block_id: int
    after: Marks
    deadline: float
    number: int | None  #: in a ring


def blocks_of(
    move: BlockSave | BlockLoad, rank: int, after: Marks, deadline: float
) -> Iterable[Block]:
    """The ways of all blocks of `move`."""
    handle = move.handle
    for index, block_id in enumerate(move.block_ids, start=move.first):
        yield Block(
            key=handle.key(index, rank),
            content=handle.content(index, rank),
            shared=index < len(handle.hashes),
            block_id=block_id,
            after=after,
            deadline=deadline,
            number=move.number(index),
        )


def batches_of(blocks: Sequence[Block], size: int) -> Iterable[Sequence[Block]]:
    """`blocks` in groups of `size` that are each one thread's."""
    for begin in range(0, len(blocks), size):
        yield blocks[begin : begin + size]


class Own(threading.local):
    """What each thread has for itself."""

    copier: Copier
    staging: Staging
    header: memoryview


class Movers:
    """A fixed number of threads."""

    def __init__(self, name: str, num_threads: int, pages: BlockPages, *, staging: bool) -> None:
        """`staging`: give each thread memory for one block, now."""
        self.num_threads = num_threads
        many = ManyCopies.of_vllm(pages)
        # All memory is taken now: a host that lacks it says so at the start.
        stagings = [Staging(pages) for _ in range(num_threads)] if staging else []
        self.own = Own()

        def equip() -> None:
            if pages.device.type == "cuda":
                torch.cuda.set_device(pages.device)
            self.own.copier = Copier(pages, many)
            self.own.header = memoryview(bytearray(HEADER_BYTES))
            if staging:
                self.own.staging = stagings.pop()

        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(
            num_threads, name, initializer=equip
        )

    def submit(self, job: Callable[..., None], *arguments: object) -> None:
        """Have `job` done. Raises RuntimeError after `close`."""
        threads = self._threads
        if threads is None:
            raise RuntimeError("closed")
        threads.submit(job, *arguments)

    def close(self) -> None:
        """Wait for what is under way; drop the rest."""
        threads, self._threads = self._threads, None  # it has the memory of threads never started
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        self.own = Own()
