"""What does a block look like as bytes, and can it be trusted?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtasks.kv.codec import HEADER_BYTES, CorruptBlock, seal, unseal

OURS = "0123456789abcdef"
FOREIGN = "0123456789abcdee"


def sealed(payload: bytes, fingerprint: str = OURS) -> bytearray:
    buffer = bytearray(HEADER_BYTES) + payload
    seal(memoryview(buffer), fingerprint)
    return buffer


@given(st.binary(max_size=300))
def test_a_sealed_block_opens_to_the_same_payload(payload: bytes) -> None:
    value = sealed(payload)

    assert bytes(unseal(memoryview(value), OURS, len(payload))) == payload


def test_opening_copies_nothing() -> None:
    value = sealed(b"payload")

    payload = unseal(memoryview(value), OURS, 7)

    value[HEADER_BYTES] = ord("P")
    assert bytes(payload) == b"Payload"


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_flipped_bit_anywhere_is_noticed(payload: bytes, data: st.DataObject) -> None:
    value = sealed(payload)
    place = data.draw(st.integers(0, len(value) - 1))
    value[place] ^= 1 << data.draw(st.integers(0, 7))

    with pytest.raises(CorruptBlock):
        unseal(memoryview(value), OURS, len(payload))


@given(st.binary(max_size=100), st.data())
def test_a_value_of_another_length_is_refused(payload: bytes, data: st.DataObject) -> None:
    value = sealed(payload)
    cut = data.draw(st.integers(0, len(value) - 1))

    with pytest.raises(CorruptBlock):
        unseal(memoryview(value)[:cut], OURS, len(payload))
    with pytest.raises(CorruptBlock):
        unseal(memoryview(bytes(value) + b"x"), OURS, len(payload))


def test_a_block_of_another_engine_is_refused() -> None:
    value = sealed(b"payload", FOREIGN)

    with pytest.raises(CorruptBlock, match="another engine"):
        unseal(memoryview(value), OURS, 7)


def test_an_intact_block_of_another_size_is_refused() -> None:
    # The header tells the truth, but the reader's cache has blocks of another size.
    value = sealed(b"payload")

    with pytest.raises(CorruptBlock):
        unseal(memoryview(value), OURS, 8)


def test_nothing_but_a_header_is_refused_where_a_payload_is_due() -> None:
    with pytest.raises(CorruptBlock):
        unseal(memoryview(b""), OURS, 7)
