"""Is docs/api.md complete, and does each of its rows name what shows it?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from api.parameters import _BEST_OF, _PRIORITY, MODELS, ONLY_RENDERED, REFUSED, UNKNOWN
from tests.acceptance.parameter_cases import CASES, CHAT, MESSAGES, PLAIN, RESPONSES

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
PATHS = (CHAT, PLAIN, RESPONSES, MESSAGES)
#: What is said before any route.
SENTENCES = {**REFUSED, **ONLY_RENDERED, "priority": _PRIORITY}

#: Shown by a test of its own, for vLLM's app answers otherwise.
ELSEWHERE = {"background": "acceptance/test_batches.py"}

_ROW = re.compile(
    r"^\| `(\w+)` \|((?: (?:works|refused|no effect|) ?\|){4}) (.*) \|$", re.MULTILINE
)
_NAME = re.compile(r"`([^`]+)`")


class Row(NamedTuple):
    """A parameter, and what it does on each route that has it."""

    name: str
    does: dict[str, str]
    shown: str


def rows() -> Iterator[Row]:
    for name, cells, shown in _ROW.findall(PAGE):
        does = [cell.strip() for cell in cells.split("|")[:4]]
        yield Row(name, {p: d for p, d in zip(PATHS, does, strict=True) if d}, shown)


ROWS = list(rows())


def cases(row: Row, path: str) -> list[int]:
    """What the cases of a row that use its parameter on a route are answered with."""
    named = [CASES[name] for name in _NAME.findall(row.shown) if name in CASES]
    return [c.status for c in named if c.path == path and row.name in c.body("model")]


@pytest.mark.parametrize("path", PATHS)
def test_every_parameter_of_vllms_models_has_a_row_and_no_other(path: str) -> None:
    assert {row.name for row in ROWS if path in row.does} == set(MODELS[path].model_fields)


def test_no_parameter_has_two_rows() -> None:
    names = [row.name for row in ROWS]

    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_every_row_names_what_shows_it(row: Row) -> None:
    for path, does in row.does.items():
        if does == "refused" and row.name in SENTENCES:
            assert SENTENCES[row.name] in row.shown
        elif does == "refused":
            assert cases(row, path)
            assert all(400 <= status < 500 for status in cases(row, path))
            assert '"' in row.shown, "what is said"
        elif row.name in ELSEWHERE:
            assert f"`{ELSEWHERE[row.name]}`" in row.shown
        else:
            assert 200 in cases(row, path), f"no case shows {row.name} of {path}"


def test_every_case_that_is_named_exists_and_every_case_is_named() -> None:
    heads = [row.shown.partition(";")[0] for row in ROWS]
    named = {name for head in heads if head[0] == "`" for name in _NAME.findall(head)}

    assert named - set(CASES) == set()
    assert [name for name in CASES if f"`{name}`" not in PAGE] == []


def test_every_refusal_is_told_in_its_words() -> None:
    for sentence in {*SENTENCES.values(), *UNKNOWN.values(), _BEST_OF}:
        assert f'"{sentence}"' in PAGE
    for name in (*UNKNOWN, "best_of"):
        assert f"`{name}`" in PAGE


def test_every_test_that_is_named_exists() -> None:
    tests = Path(__file__).parents[1]
    named = re.findall(r"`((?:unit|integration|acceptance)/[\w/]+\.py)`", PAGE)

    assert named
    assert [path for path in named if not (tests / path).is_file()] == []
