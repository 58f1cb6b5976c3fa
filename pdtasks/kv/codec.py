"""What does a block look like as bytes, and can it be trusted?

A value in the store is a header followed by the block's payload (all layers of one rank)::

    magic 4s | format u16 | reserved u16 | fingerprint 8s | payload bytes u64 | xxh3-64 u64

All integers are little-endian.  A value that is short, foreign or damaged raises `CorruptBlock`,
which a reader treats as a miss.
"""

from __future__ import annotations

import struct

import xxhash

from pdtasks.kv.keys import FORMAT_VERSION

_HEADER = struct.Struct("<4sHH8sQQ")
_MAGIC = b"PDKV"

#: Bytes before the payload.
HEADER_BYTES = _HEADER.size


class CorruptBlock(Exception):
    """The bytes under a block's name are not that block."""


def seal(buffer: memoryview, fingerprint: str) -> None:
    """Write the header into the first `HEADER_BYTES` of `buffer`, whose rest is the payload."""
    payload = buffer[HEADER_BYTES:]
    checksum = xxhash.xxh3_64_intdigest(payload)
    _HEADER.pack_into(
        buffer, 0, _MAGIC, FORMAT_VERSION, 0, bytes.fromhex(fingerprint), len(payload), checksum
    )


def unseal(value: memoryview, fingerprint: str, payload_bytes: int) -> memoryview:
    """Return the payload of `value`, which must be a sealed block of `payload_bytes`.

    Raises:
        CorruptBlock: wrong length, another format or fingerprint, or a checksum that differs.
    """
    if len(value) != HEADER_BYTES + payload_bytes:
        raise CorruptBlock(f"{len(value)} bytes instead of {HEADER_BYTES + payload_bytes}")
    magic, version, reserved, owner, length, checksum = _HEADER.unpack_from(value)
    if magic != _MAGIC or version != FORMAT_VERSION or reserved:
        raise CorruptBlock(f"unknown format {magic!r} {version}")
    if owner != bytes.fromhex(fingerprint) or length != payload_bytes:
        raise CorruptBlock(f"written by another engine ({owner.hex()})")
    payload = value[HEADER_BYTES:]
    if xxhash.xxh3_64_intdigest(payload) != checksum:
        raise CorruptBlock("checksum differs")
    return payload
