"""What does a decode worker have to know to load a prompt's KV?

The handle is made by the engine that computed the prompt and read by the one that continues.
It names every block, so nobody has to compute the same hash twice, and it ties the request to
no particular prefill worker.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pdtasks.kv.keys import block_key, tail_key


class KVHandle(msgspec.Struct, frozen=True, kw_only=True):
    """Where the KV of `num_tokens` prompt tokens lies."""

    fingerprint: str  #: `pdtasks.kv.keys.Fingerprint.digest` of the engine that wrote the blocks
    transfer_id: str  #: names the partial last block
    num_tokens: int  #: prompt tokens whose KV is stored
    block_size: int  #: tokens in a block
    hashes: tuple[bytes, ...]  #: content hash of each full block, first block first
    #: Says what the partial last block contains: its name says only whose it is.
    tail_digest: str = ""
    tp_size: int = 1  #: ranks that each wrote their part of a block
    expires_at: float = 0.0  #: UNIX seconds after which the blocks may be gone
    made_at: float = 0.0  #: UNIX seconds; blocks may still be on their way to the store
    #: The engine in whose rings (`pdtasks.kv.ring`) the blocks are too; None: the store has all.
    ring: str | None = None
    #: Their numbers there: runs of consecutive ones, first number and length, first block first.
    numbers: tuple[tuple[int, int], ...] = ()

    @property
    def num_blocks(self) -> int:
        """Full blocks and, where there is one, the partial last block."""
        return len(self.hashes) + self.has_tail

    @property
    def has_tail(self) -> bool:
        """True when the last block is only partly filled."""
        return self.num_tokens > len(self.hashes) * self.block_size

    def number(self, index: int) -> int | None:
        """Of block `index` in the rings; None: it has none."""
        for first, length in self.numbers:
            if index < length:
                return first + index
            index -= length
        return None

    def key(self, index: int, rank: int) -> str:
        """Name in the store of block `index` as `rank` wrote it."""
        if index < len(self.hashes):
            return block_key(self.fingerprint, rank, self.hashes[index])
        return tail_key(self.transfer_id, rank)

    def content(self, index: int, rank: int) -> str:
        """What seals block `index`: another content, another seal, also under the same name."""
        key = self.key(index, rank)
        return key if index < len(self.hashes) else f"{key}:{self.tail_digest}"

    def to_wire(self) -> dict[str, Any]:
        """Plain values for vLLM's `kv_transfer_params`, fit for JSON."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> KVHandle:
        """Rebuild a handle; raises msgspec.ValidationError when `wire` is not one."""
        return msgspec.convert(wire, cls)
