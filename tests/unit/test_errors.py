"""What can go wrong, with the HTTP status that a caller sees."""

from __future__ import annotations

import inspect

import pytest

from pdtasks import errors
from pdtasks.errors import PdtasksError, from_code

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, PdtasksError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_keeps_its_kind_and_words_on_the_way(kind: type[PdtasksError]) -> None:
    error = kind("what to do about it")

    again = from_code(error.code, str(error))

    assert type(again) is kind
    assert str(again) == "what to do about it"


@pytest.mark.parametrize("code", ["NotOneOfOurs", "OSError", "annotations", "from_code", ""])
def test_an_unknown_error_is_a_plain_failure(code: str) -> None:
    error = from_code(code, "why")

    assert type(error) is PdtasksError
    assert (str(error), error.http_status) == ("why", 500)
