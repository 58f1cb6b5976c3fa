"""What does a block look like as bytes, and can it be trusted?"""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pdtasks.kv.codec import HEADER_BYTES, CorruptBlock, check, seal

OURS = "0123456789abcdef"
FOREIGN = "0123456789abcdee"
KEY = "pd:kv:0123456789abcdef:0:6b"

payloads = st.binary(max_size=300)
keys = st.text(max_size=80)


def sealed(payload: bytes, key: str = KEY, fingerprint: str = OURS) -> bytearray:
    """The value that the store gets."""
    return bytearray(seal(key, memoryview(payload), fingerprint) + payload)


def opened(value: bytes | bytearray, key: str = KEY, fingerprint: str = OURS) -> bytes:
    """The payload of `value`, once it has been checked."""
    view = memoryview(value)
    check(view[:HEADER_BYTES], key, view[HEADER_BYTES:], fingerprint)
    return bytes(view[HEADER_BYTES:])


@given(payloads, keys)
def test_a_sealed_block_is_taken_for_what_it_is(payload: bytes, key: str) -> None:
    value = sealed(payload, key)

    assert opened(value, key) == payload


@given(payloads, keys)
def test_a_header_is_as_long_as_readers_expect_and_the_same_each_time(
    payload: bytes, key: str
) -> None:
    headers = {seal(key, memoryview(payload), OURS) for _ in range(2)}

    (header,) = headers
    assert len(header) == HEADER_BYTES


@given(payloads, st.data())
def test_a_flipped_bit_anywhere_is_noticed(payload: bytes, data: st.DataObject) -> None:
    value = sealed(payload)
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    with pytest.raises(CorruptBlock):
        opened(value)


def test_every_bit_of_the_header_counts() -> None:
    for bit in range(8 * HEADER_BYTES):
        value = sealed(b"payload")
        value[bit // 8] ^= 1 << bit % 8

        with pytest.raises(CorruptBlock):
            opened(value)


@given(payloads, keys, keys)
def test_a_block_stored_under_another_name_is_refused(payload: bytes, key: str, other: str) -> None:
    # Two blocks of one engine have the same length and fingerprint: only the name tells them apart.
    assume(key != other)
    value = sealed(payload, key)

    with pytest.raises(CorruptBlock, match="checksum"):
        opened(value, other)


@given(payloads, payloads)
def test_the_header_of_one_payload_does_not_vouch_for_another(one: bytes, other: bytes) -> None:
    assume(one != other)

    with pytest.raises(CorruptBlock):
        opened(sealed(one)[:HEADER_BYTES] + other)


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_payload_of_another_length_is_refused(payload: bytes, data: st.DataObject) -> None:
    value = sealed(payload)
    cut = data.draw(st.integers(HEADER_BYTES, len(value) - 1))

    with pytest.raises(CorruptBlock):
        opened(value[:cut])
    with pytest.raises(CorruptBlock):
        opened(value + b"x")


def test_a_block_of_another_engine_is_refused() -> None:
    value = sealed(b"payload", fingerprint=FOREIGN)

    with pytest.raises(CorruptBlock, match="another engine"):
        opened(value)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), payloads)
def test_garbage_is_refused(header: bytes, payload: bytes) -> None:
    assume(header != seal(KEY, memoryview(payload), OURS))

    with pytest.raises(CorruptBlock):
        opened(header + payload)
