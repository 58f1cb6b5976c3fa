"""Is ARCHITECTURE.md still true?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "ARCHITECTURE.md"
PACKAGES = ("pdtasks", "api", "configs")

#: A line of the module list: a table's row or a list's item that begins with a path in backticks.
_ENTRY = re.compile(r"^\s*(?:[-*|]\s*)`((?:pdtasks|api|configs)/[\w/]+\.py)`", re.MULTILINE)


@pytest.fixture(scope="module")
def listed() -> list[str]:
    return _ENTRY.findall(PAGE.read_text())


def modules() -> set[str]:
    """Every module that does something; a bare `__init__.py` only marks a package."""
    found = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return {
        str(path.relative_to(ROOT))
        for path in found
        if path.name != "__init__.py" or len(path.read_text().splitlines()) > 15
    }


def test_every_module_that_is_named_exists(listed: list[str]) -> None:
    assert [path for path in listed if not (ROOT / path).is_file()] == []


def test_every_module_is_named(listed: list[str]) -> None:
    assert sorted(modules() - set(listed)) == []


def test_no_module_is_named_twice(listed: list[str]) -> None:
    assert sorted({path for path in listed if listed.count(path) > 1}) == []


@pytest.mark.parametrize("path", sorted(modules()))
def test_every_module_says_what_it_is_for(path: str) -> None:
    assert (ROOT / path).read_text().lstrip().startswith('"""')


def test_keys_of_the_bus_are_spelt_in_one_place() -> None:
    spelling = re.compile(r"""f?["']pd:(?!kv:)""")  # (those of the kv servers: kv/keys.py)
    spelt = [path for path in sorted(modules()) if spelling.search((ROOT / path).read_text())]

    assert spelt == ["pdtasks/bus/keys.py"]


def test_the_tests_that_prove_a_guarantee_exist() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`((?:unit|integration|acceptance)/[\w/]+\.py)`", page)

    assert len(named) > 10
    assert [path for path in named if not (ROOT / "tests" / path).is_file()] == []
