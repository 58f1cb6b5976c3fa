"""Does docs/observability.md name every metric of ours, and no other, with its type?"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "observability.md").read_text()
_ROW: Final = re.compile(r"^\| `(pdtasks_\w+)` \| (\w+) \| [\w, ]+ \| .+ \|$", re.MULTILINE)
_TYPES: Final = {
    name + family: name.lower()
    for name in ("Counter", "Gauge", "Histogram")
    for family in ("", "MetricFamily")
} | {"Counted": "counter"}


def in_code() -> Iterator[tuple[str, str]]:
    """Name and type of each metric that code makes."""
    for package in ("pdtasks", "api"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                    continue
                kind = _TYPES.get(node.func.id)
                if kind and node.args:
                    for name in _names(node.args[0]):
                        yield name + "_total" * (kind == "counter"), kind


def _names(argument: ast.expr) -> list[str]:
    if isinstance(argument, ast.Constant) and str(argument.value).startswith("pdtasks_"):
        return [str(argument.value)]
    return []


def test_every_metric_has_a_row_with_its_type_and_no_other_has_one() -> None:
    found = dict(in_code())

    assert len(found) > 30, "nothing is found any more"
    assert dict(_ROW.findall(PAGE)) == found


def test_no_metric_has_two_rows() -> None:
    names = [name for name, _ in _ROW.findall(PAGE)]

    assert sorted(names) == sorted(set(names))


def test_names_end_with_their_unit_as_prometheus_wants_it() -> None:
    wrong = [name for name, _ in in_code() if re.search(r"_(ms|s|sec|kb|mb|percent|perc)$", name)]

    assert wrong == []
