"""What is a KV block called in the store?

A full block is named by what it contains, never by who made it::

    pd:kv:<fingerprint>:<rank>:<block hash>

The hash is vLLM's own: it chains over the whole prefix and covers LoRA adapter, multimodal inputs
and `cache_salt`, so two prompts share exactly the blocks of their common beginning.  The last,
partly filled block belongs to one hand-over::

    pd:kv:tail:<transfer id>:<rank>

and whoever knows the transfer's id can delete it.  The fingerprint changes whenever two engines
could no longer read each other's blocks.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

#: Version of the stored bytes. History: 1 - header, then all layers of one block; 2 - the checksum
#: is seeded with the name.
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that must agree before one engine may read another's blocks."""

    model: str  #: digest of the model's configuration and weights
    dtype: str  #: of the activations, e.g. ``bfloat16``
    kv_dtype: str  #: of the cache, e.g. ``auto``
    block_size: int  #: tokens in a block
    block_bytes: int  #: bytes of a block, all layers, one rank
    layout: str  #: vLLM's physical order, e.g. ``LBHNC``
    packing: str  #: how the attention kernels order the numbers inside a block, e.g. ``cpu amx``
    num_layers: int
    tp_size: int
    vllm_version: str
    format_version: int = FORMAT_VERSION

    def digest(self) -> str:
        """Return 16 hex digits that differ when any field differs."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:16]


def block_key(fingerprint: str, rank: int, block_hash: bytes) -> str:
    """Name of a full block in the store."""
    return f"pd:kv:{fingerprint}:{rank}:{block_hash.hex()}"


def tail_key(transfer_id: str, rank: int) -> str:
    """Name of the partly filled last block of one hand-over."""
    return f"pd:kv:tail:{transfer_id}:{rank}"
