"""Is a file what was sent, however it comes, and is anything else refused?"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.uploading import BadForm, Form, read_form

KIND = "multipart/form-data; boundary=b"


def a_part(head: str, content: bytes) -> bytes:
    return f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"


def a_form(content: bytes, *, file_first: bool) -> bytes:
    parts = [a_part('name="purpose"', b"batch"), a_part('name="file"; filename="f.jsonl"', content)]
    return b"".join(reversed(parts) if file_first else parts) + b"--b--\r\n"


def read(body: bytes, size: int, kind: str = KIND) -> tuple[Form, bytes, int]:
    """The form, its file, and the largest piece of it that was written at once."""
    written: list[bytes] = []

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def write(piece: bytes) -> None:
        written.append(piece)

    form = asyncio.run(read_form(kind, pieces(), write, file_field="file"))
    return form, b"".join(written), max(map(len, written), default=0)


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("size", [1, 5, 4096])
def test_a_file_comes_as_it_was_sent(size: int, file_first: bool) -> None:
    content = b"\r\n--\r\n--b\n\r\n--bb" + bytes(range(256)) * 4

    form, found, largest = read(a_form(content, file_first=file_first), size)

    assert found == content
    assert (form.filename, form.fields) == ("f.jsonl", {"purpose": "batch"})
    assert largest <= size + 8  # a little that might have been a boundary


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (a_form(b"x", file_first=False), "application/json"),
        (a_form(b"x", file_first=False), "multipart/form-data"),
        (a_form(b"x", file_first=False)[:-10], KIND),
        (a_part('name="purpose"', b"batch") + b"--b--", KIND),
        (a_part('name="other"; filename="f"', b"x") + b"--b--", KIND),
        (a_part('name="file"; filename="f"', b"x") * 2 + b"--b--", KIND),
        (a_part('name="purpose"', b"x" * 2000) + b"--b--", KIND),
        (b"".join(a_part(f'name="{n}"', b"") for n in range(20)) + b"--b--", KIND),
        (b"--b\r\nX: " + b"x" * 1_000_000, KIND),
        (b"--b\r\n" + b"X: y\r\n" * 1000, KIND),
        (b"", KIND),
    ],
)
def test_what_is_no_form_with_one_file_is_refused(body: bytes, kind: str) -> None:
    with pytest.raises(BadForm):
        read(body, 512, kind)


@settings(max_examples=30, deadline=None)  # each is an event loop
@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_random_changes_are_a_file_or_no_form(noise: bytes, seed: int) -> None:
    chance = random.Random(seed)
    body = bytearray(a_form(b"content", file_first=bool(seed % 2)))
    at = chance.randrange(len(body))
    body[at : at + chance.randrange(9)] = noise

    try:
        form, _, _ = read(bytes(body), chance.randrange(1, 100))
    except BadForm:
        return
    assert form.filename is not None
