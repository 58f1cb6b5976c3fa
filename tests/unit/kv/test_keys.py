"""What is a KV block called in the store?"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtasks.kv.keys import Fingerprint, block_key, tail_key

ENGINE = Fingerprint(
    model="0123456789abcdef",
    dtype="bfloat16",
    kv_dtype="auto",
    block_size=16,
    block_bytes=4096,
    layout="LBHNC",
    packing="cpu vec",
    num_layers=30,
    tp_size=1,
    vllm_version="0.32.0",
)


def test_equal_engines_have_the_same_digest() -> None:
    assert replace(ENGINE).digest() == ENGINE.digest()
    assert len(bytes.fromhex(ENGINE.digest())) == 8


@pytest.mark.parametrize("name", [f.name for f in fields(Fingerprint)])
def test_any_field_that_differs_changes_the_digest(name: str) -> None:
    value = getattr(ENGINE, name)
    changed: dict[str, Any] = {name: value + 1 if isinstance(value, int) else value + "x"}
    other = replace(ENGINE, **changed)

    assert other.digest() != ENGINE.digest()


def test_neighbouring_fields_do_not_run_into_each_other() -> None:
    # "bfloat16" + "auto" and "bfloat1" + "6auto" are different engines.
    other = replace(ENGINE, dtype="bfloat1", kv_dtype="6auto")

    assert other.digest() != ENGINE.digest()


@given(
    st.tuples(st.sampled_from(["a" * 16, "b" * 16]), st.integers(0, 7), st.binary(min_size=32)),
    st.tuples(st.sampled_from(["a" * 16, "b" * 16]), st.integers(0, 7), st.binary(min_size=32)),
)
def test_a_block_has_a_name_of_its_own(
    one: tuple[str, int, bytes], other: tuple[str, int, bytes]
) -> None:
    assert (block_key(*one) == block_key(*other)) == (one == other)


@given(st.text(), st.integers(0, 7), st.text(), st.integers(0, 7))
def test_each_rank_has_a_partial_block_of_its_own(
    one: str, one_rank: int, other: str, other_rank: int
) -> None:
    same_name = tail_key(one, one_rank) == tail_key(other, other_rank)

    assert same_name == ((one, one_rank) == (other, other_rank))


@given(st.text(), st.binary())
def test_a_partial_block_is_never_taken_for_a_shared_one(
    transfer_id: str, block_hash: bytes
) -> None:
    # A caller can influence its request id; it must not be able to name a shared block with it.
    assert tail_key(transfer_id, 0) != block_key(ENGINE.digest(), 0, block_hash)
