"""When are the blocks that a step writes complete?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import cast

import pytest

from pdtasks.kv.marks import Mark, Marks, Part, StepMarks

FIRST = Part(0, 20, frozenset({"layer.0", "layer.1"}))
LAST = Part(20, 30, frozenset({"layer.2"}))
WHOLE = Part(0, 30)


class Numbered:
    """Pages whose points are numbered."""

    def __init__(self) -> None:
        self.parts: Sequence[Part] = [FIRST, LAST]
        self._numbers = count(1)

    def mark(self) -> Mark:
        return cast("Mark", next(self._numbers))


def numbers(marks: Marks) -> list[tuple[Part, int]]:
    return [(part, cast("int", mark)) for part, mark in marks]


@pytest.fixture
def marks() -> StepMarks:
    """Of a step that saves."""
    marks = StepMarks(Numbered())
    marks.begin(saves=True)
    return marks


def test_a_part_is_complete_with_the_last_of_its_layers(marks: StepMarks) -> None:
    for layer in ("layer.1", "layer.0", "layer.2"):
        marks.layer_done(layer)

    assert numbers(marks.end()) == [(FIRST, 1), (LAST, 2)]


def test_a_layer_that_is_computed_in_pieces_is_complete_with_the_last(marks: StepMarks) -> None:
    # A draft model takes several turns in one step.
    for layer in ("layer.0", "layer.1", "layer.0", "layer.2", "layer.2"):
        marks.layer_done(layer)

    assert numbers(marks.end()) == [(FIRST, 2), (LAST, 4)]


@pytest.mark.parametrize("told", [[], ["layer.0", "layer.2"], ["layer.0", "layer.1"]])
def test_where_not_every_layer_tells_the_end_of_the_step_counts(
    marks: StepMarks, told: list[str]
) -> None:
    # In a captured graph none does.
    for layer in [*told, "another"]:
        marks.layer_done(layer)

    [(part, mark)] = numbers(marks.end())

    assert part == WHOLE
    assert mark == 1 + len(told) // 2


def test_points_of_a_step_are_not_those_of_the_next(marks: StepMarks) -> None:
    for layer in ("layer.0", "layer.1", "layer.2"):
        marks.layer_done(layer)  # a step that never came to its end
    marks.begin(saves=True)

    assert numbers(marks.end()) == [(WHOLE, 3)]


def test_a_step_without_saves_makes_no_points(marks: StepMarks) -> None:
    marks.begin(saves=False)
    for layer in ("layer.0", "layer.1", "layer.2"):
        marks.layer_done(layer)
    marks.begin(saves=True)

    assert numbers(marks.end()) == [(WHOLE, 1)]
