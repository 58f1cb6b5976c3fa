"""How do the figures look? Latency and goodput over the rate, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_PANELS: Final = (
    ("ttft_mean_ms", "TTFT, mean, ms"),
    ("gap_p99_ms", "first to second token, p99, ms"),
    ("itl_p99_ms", "ITL p99, ms"),
    ("e2e_mean_ms", "end to end, mean, ms"),
    ("goodput", "good answers/s"),
)

Rows = Sequence[dict[str, Any]]  #: as in `rows.json`


def draw_rates(rows: Rows, file: Path) -> None:
    """Write a PNG: a line of panels for each workload that was asked at several rates.

    The figure is made without pyplot, which would look for a display. Raises ValueError when no
    workload was asked at several rates.
    """
    mpl.use("agg")
    rates: dict[str, set[float]] = {}
    for row in rows:
        rates.setdefault(row["workload"], set()).add(row["rate"])
    workloads = [workload for workload, own in rates.items() if len(own) > 1]
    if not workloads:
        raise ValueError("no workload was asked at several rates")
    figure = Figure(figsize=(16, 3.4 * len(workloads)), layout="constrained")
    grid = figure.subplots(len(workloads), len(_PANELS), squeeze=False)
    drawn = [row for row in rows if row["workload"] in workloads]
    topologies = list(dict.fromkeys(row["topology"] for row in drawn))
    for line, workload in zip(grid, workloads, strict=True):
        for axes, (name, title) in zip(line, _PANELS, strict=True):
            _panel(axes, [r for r in drawn if r["workload"] == workload], topologies, name)
            axes.set_title(title, fontsize=10)
        line[0].set_ylabel(workload)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.savefig(file, format="png", dpi=100)


def draw_stages(rows: Rows, file: Path) -> None:
    """Write a PNG: what pdtasks' stages say of each workload, as bars. Milliseconds.

    Raises ValueError when no row has reports.
    """
    mpl.use("agg")
    told = [row for row in rows if row.get("stages_ms")]
    if not told:
        raise ValueError("no row has what the stages said")
    parts = [
        (f"{stage}: {key}", stage, key)
        for stage in told[0]["stages_ms"]
        for key in told[0]["stages_ms"][stage]
    ]
    figure = Figure(figsize=(11, 1.5 + 0.5 * len(told)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(parts)
    for number, (label, stage, key) in enumerate(parts):
        values = [row["stages_ms"].get(stage, {}).get(key, 0.0) for row in told]
        at = [index + number * height for index in range(len(told))]
        axes.barh(at, values, height, label=label)
    names = [f"{row['topology']}, {row['workload']} at {row['rate']:g}/s" for row in told]
    axes.set_yticks([index + 0.4 for index in range(len(told))], names, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("ms, mean")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=len(parts), fontsize=8)
    figure.savefig(file, format="png", dpi=100)


def _panel(axes: Axes, rows: Rows, topologies: Sequence[str], name: str) -> None:
    for number, topology in enumerate(topologies):
        own: dict[float, list[float]] = {}
        for row in rows:
            if row["topology"] == topology and row.get(name) is not None:
                own.setdefault(row["rate"], []).append(row[name])
        at = sorted(own)
        middle = [sorted(own[rate])[len(own[rate]) // 2] for rate in at]
        axes.plot(at, middle, color=f"C{number}", marker="o", label=topology)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_xlabel("requests/s")
    axes.grid(alpha=0.3)
