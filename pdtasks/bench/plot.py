"""How do the figures look?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from pdtasks.bench.report import OPS, Row, format_size, paths_of


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write a PNG: GB/s over the value's size, at the best and at the lowest number of connections.

    The figure is made without pyplot, which would look for a display.
    """
    mpl.use("agg")
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    sizes = sorted({row.value_bytes for row in rows})
    fewest = min(row.connections for row in rows)
    for axes, op in zip(figure.subplots(1, len(OPS), sharey=True), OPS, strict=True):
        for number, path in enumerate(paths_of(rows)):
            own = [row for row in rows if (row.path, row.op) == (path, op)]
            color = f"C{number}"
            axes.plot(*_best(own), color=color, marker="o", label=path)
            few = [row for row in own if row.connections == fewest]
            axes.plot(*_best(few), color=color, marker=".", linestyle=":", alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [format_size(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(op)
        axes.set_xlabel("value")
        axes.grid(alpha=0.3)
    axes = figure.axes[0]
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s")
    figure.suptitle(
        "KV blocks to another process and back; "
        f"solid: best of the connections, dotted: {fewest} connection{'s' if fewest > 1 else ''}"
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(file, format="png", dpi=110)


def _best(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """Sizes, and for each the highest figure."""
    best: dict[int, float] = {}
    for row in rows:
        best[row.value_bytes] = max(best.get(row.value_bytes, 0.0), row.gb_per_s)
    return sorted(best), [best[size] for size in sorted(best)]
