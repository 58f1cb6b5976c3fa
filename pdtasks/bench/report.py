"""How are the figures shown: as tables, as ratios of this run, as JSON?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

OPS: Final = ("put", "get")

#: What is divided by what, and for which operations.
_RATIOS: Final = (
    ("pdtasks-tcp", "socket-tcp", OPS),
    ("pdtasks-unix", "socket-unix", OPS),
    ("pdtasks-tcp", "valkey-py", ("put",)),
)


@dataclass(frozen=True)
class Row:
    """One figure."""

    path: str
    op: str  #: put or get
    value_bytes: int  #: of the payload
    connections: int
    gb_per_s: float  #: 1e9 bytes of payload, all connections together


def format_report(rows: Sequence[Row]) -> str:
    """Two tables, then the ratios."""
    blocks = [_table(op, [row for row in rows if row.op == op]) for op in OPS]
    return "\n\n".join([*blocks, "\n".join(_ratio_lines(rows))])


def to_json(rows: Iterable[Row]) -> str:
    """A list of rows, each with the fields of `Row`."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def format_size(size: int) -> str:
    """In MiB or KiB."""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size / 1024:g} KiB"


def paths_of(rows: Iterable[Row]) -> list[str]:
    """Their paths in the order in which they were measured first."""
    return list(dict.fromkeys(row.path for row in rows))


def _table(op: str, rows: Sequence[Row]) -> str:
    paths = paths_of(rows)
    figures = {(row.value_bytes, row.connections, row.path): row.gb_per_s for row in rows}
    lines = [[f"{op}, GB/s", *paths]]
    for size, connections in dict.fromkeys((row.value_bytes, row.connections) for row in rows):
        found = [figures.get((size, connections, path)) for path in paths]
        lines.append(
            [_place(size, connections), *("-" if f is None else f"{f:.2f}" for f in found)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _ratio_lines(rows: Sequence[Row]) -> list[str]:
    """`a / b`: the geometric mean over sizes and connections, and where it is lowest."""
    figures = {(row.path, row.op, row.value_bytes, row.connections): row.gb_per_s for row in rows}
    lines = []
    for above, below, ops in _RATIOS:
        shown = []
        for op in ops:
            ratios = {
                (size, connections): figure / figures[below, op, size, connections]
                for (path, o, size, connections), figure in figures.items()
                if (path, o) == (above, op) and (below, op, size, connections) in figures
            }
            if ratios:
                mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
                lowest = min(ratios, key=ratios.__getitem__)
                shown.append(f"{op} {mean:.2f} (lowest {ratios[lowest]:.2f} at {_place(*lowest)})")
        if shown:
            lines.append(f"{above} / {below}: {', '.join(shown)}")
    return lines


def _place(size: int, connections: int) -> str:
    return f"{format_size(size)} × {connections}"
