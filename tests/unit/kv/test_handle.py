"""What does a decode worker have to know to load a prompt's KV?"""

from __future__ import annotations

import json
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from pdtasks.kv.handle import KVHandle
from pdtasks.kv.keys import block_key, tail_key

FP = "0123456789abcdef"


def a_handle(
    num_tokens: int = 40, block_size: int = 16, tp_size: int = 1, tail_digest: str = "d1"
) -> KVHandle:
    return KVHandle(
        fingerprint=FP,
        transfer_id="t1",
        num_tokens=num_tokens,
        block_size=block_size,
        hashes=tuple(bytes([i]) * 32 for i in range(num_tokens // block_size)),
        tail_digest=tail_digest,
        tp_size=tp_size,
        expires_at=1e9,
    )


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks", "has_tail"),
    [
        (1, 1, True),
        (15, 1, True),
        (16, 1, False),
        (17, 2, True),
        (40, 3, True),
        (48, 3, False),
    ],
)
def test_it_counts_the_partial_block(num_tokens: int, num_blocks: int, has_tail: bool) -> None:
    handle = a_handle(num_tokens)

    assert (handle.num_blocks, handle.has_tail) == (num_blocks, has_tail)


def test_full_blocks_are_named_by_content_and_the_last_by_the_transfer() -> None:
    handle = a_handle(40)

    assert [handle.key(i, rank=0) for i in range(3)] == [
        block_key(FP, 0, b"\0" * 32),
        block_key(FP, 0, b"\1" * 32),
        tail_key("t1", 0),
    ]
    assert handle.key(0, rank=1) != handle.key(0, rank=0)


def test_a_full_blocks_name_says_what_it_contains_and_a_partial_ones_does_not() -> None:
    one, other = a_handle(40), a_handle(40, tail_digest="d2")

    for index in (0, 1):
        assert one.content(index, 0) == other.content(index, 0) == one.key(index, 0)
    assert one.key(2, 0) == other.key(2, 0)
    assert one.content(2, 0) != other.content(2, 0)
    assert len({one.content(index, rank) for index in range(3) for rank in range(2)}) == 6


def test_it_is_fit_for_json() -> None:
    assert KVHandle.from_wire(json.loads(json.dumps(a_handle().to_wire()))) == a_handle()


@given(
    st.builds(
        KVHandle,
        fingerprint=st.text(),
        transfer_id=st.text(),
        num_tokens=st.integers(0, 1 << 40),
        block_size=st.integers(1, 4096),
        hashes=st.lists(st.binary(max_size=40), max_size=5).map(tuple),
        tail_digest=st.text(),
        tp_size=st.integers(1, 64),
        expires_at=st.floats(allow_nan=False),
    )
)
def test_it_survives_the_way_from_engine_to_engine(handle: KVHandle) -> None:
    # Out of the prefill engine inside vLLM's outputs, …
    output = EngineCoreOutput(
        request_id="r", new_token_ids=[1], kv_transfer_params={"pdtasks": handle.to_wire()}
    )
    (wire,) = MsgpackEncoder(size_threshold=1 << 60).encode(EngineCoreOutputs(outputs=[output]))
    received = (
        MsgpackDecoder(EngineCoreOutputs).decode(cast("bytes", wire)).outputs[0].kv_transfer_params
    )
    # … then through the broker as part of a message.
    travelled: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(received["pdtasks"]))

    assert KVHandle.from_wire(travelled) == handle


@pytest.mark.parametrize("wire", [{}, {"fingerprint": 1}, {**a_handle().to_wire(), "hashes": 7}])
def test_what_is_no_handle_is_refused(wire: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        KVHandle.from_wire(wire)
