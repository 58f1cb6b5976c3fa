"""What does a block look like as bytes, and can it be trusted?

A value in the store is a header followed by the block's payload (all layers of one rank)::

    magic 4s | format u16 | reserved u16 | fingerprint 8s | payload bytes u64 | xxh3-64 u64

All integers are little-endian.  A value that is short, foreign, damaged or stored under another
block's name raises `CorruptBlock`, which a reader treats as a miss.
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


def seal(content: str, payload: memoryview, fingerprint: str) -> bytes:
    """The header, `HEADER_BYTES` long, of `payload`, the block named by `content`."""
    return _HEADER.pack(
        _MAGIC,
        FORMAT_VERSION,
        0,
        bytes.fromhex(fingerprint),
        len(payload),
        _checksum(content, payload),
    )


def check(header: memoryview, content: str, payload: memoryview, fingerprint: str) -> None:
    """Say whether `payload`, found with `header`, is the block named by `content`.

    Raises:
        CorruptBlock: another format, fingerprint or length, or a checksum that differs.
    """
    magic, version, reserved, owner, length, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or version != FORMAT_VERSION or reserved:
        raise CorruptBlock(f"unknown format {magic!r} {version}")
    if owner != bytes.fromhex(fingerprint) or length != len(payload):
        raise CorruptBlock(f"written by another engine ({owner.hex()})")
    if _checksum(content, payload) != checksum:
        raise CorruptBlock("checksum differs")


def name_of(content: str, fingerprint: str) -> int:
    """64 bits that say which block this is, without its bytes."""
    return xxhash.xxh3_64_intdigest(f"{fingerprint}:{content}".encode())


def _checksum(content: str, payload: memoryview) -> int:
    # Seeded: an intact block under another block's name is not the one that was asked for.
    digest = xxhash.xxh3_64(seed=xxhash.xxh3_64_intdigest(content.encode()))
    # Lets other threads run meanwhile, which the one-shot function does only since xxhash 4.
    digest.update(payload)
    return digest.intdigest()
