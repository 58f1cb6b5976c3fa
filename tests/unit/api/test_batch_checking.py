"""Which lines of an input file are requests, however it is cut into pieces?"""

from __future__ import annotations

import json

import pytest

from api import batch_checking
from api.batch_checking import InputFile
from pdtasks.bus.batches import Place


def a_line(custom_id: str, **changes: object) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions"}
    body = {"body": {"model": "m", "prompt": "é"}}
    return json.dumps(line | body | changes, ensure_ascii=False).encode()


def checked(content: bytes, size: int) -> tuple[list[Place], list[tuple[int | None, str]]]:
    file = InputFile("/v1/completions", ["m", "other"], max_line_bytes=200)
    places = []
    for start in range(0, len(content), size):
        places += file.feed(content[start : start + size])
    places += file.end()
    return places, [(error["line"], error["code"]) for error in file.errors]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\n"])
@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_a_place_is_where_its_line_lies(size: int, end: bytes) -> None:
    lines = [a_line("a"), b"", b"  ", b"x" * 300, a_line("ö"), a_line("a"), a_line("c"), b"y" * 201]
    content = b"\n".join(lines) + end

    places, errors = checked(content, size)

    found = [(p.number, p.custom_id, content[p.offset : p.offset + p.length]) for p in places]
    assert [(n, name, text.strip()) for n, name, text in found] == [
        (1, "a", lines[0]),
        (2, "ö", lines[4]),
        (3, "c", lines[6]),
    ]
    assert errors == [(4, "line_too_long"), (6, "duplicate_custom_id"), (8, "line_too_long")]


def test_a_file_with_more_lines_than_a_batch_may_have_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_checking, "MOST_LINES", 2)

    _, errors = checked(b"\n".join(a_line(name) for name in "abc"), 50)

    assert errors == [(3, "too_many_lines")]


def test_of_many_errors_the_first_are_told() -> None:
    _, errors = checked(b"x\n" * 1000, 64)

    assert errors == [(number, "invalid_json_line") for number in range(1, 101)]


def test_nothing_of_a_line_is_in_its_error() -> None:
    file = InputFile("/v1/completions", ["m", "other"], max_line_bytes=200)

    for line in (b"canary", a_line("canary", method="canary"), a_line("a", url="canary")):
        file.feed(line + b"\n")

    assert len(file.errors) == 3
    assert "canary" not in str(file.errors)


@pytest.mark.parametrize("model", ["m", "other"])
def test_all_lines_ask_the_model_that_the_first_one_asks(model: str) -> None:
    file = InputFile("/v1/completions", ["m", "other"], max_line_bytes=200)
    asked = [model, "m", "other", "unknown", 7]
    file.feed(
        b"\n".join(
            a_line(str(number), body={"model": one, "prompt": "a"})
            for number, one in enumerate(asked)
        )
    )
    file.end()

    assert file.model == model
    wrong = [number for number, one in enumerate(asked, start=1) if one != model]
    assert [error["line"] for error in file.errors] == wrong
    assert {error["code"] for error in file.errors} == {"mismatched_model"}
