"""How do the model's curves look? Pictures for docs/scaling.md, drawn as `serving.plot` draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_SERVICES: Final = {"api": "API", "bus": "bus", "broker": "RabbitMQ", "kv": "kv servers"}
_FOUR_PANELS: Final = (
    ("goodput", "good answers/s"),
    ("ttft_mean_ms", "TTFT, mean, ms"),
    ("itl_p99_ms", "ITL p99, ms"),
    ("e2e_mean_ms", "end to end, mean, ms"),
)


def draw_all(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the pictures of `sweep`'s figures; returns their paths.

    Figures are made without pyplot, which would look for a display.
    """
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
        "scaling-parts.png": _draw_parts,
        "scaling-four.png": _draw_four,
    }
    for name, draw in drawn.items():
        draw(found).savefig(folder / name, format="png", dpi=100)
    return [folder / name for name in drawn]


def _draw_parts(found: Mapping[str, Any]) -> Figure:
    """For each workload: how full one of each part is, and how many it takes."""
    rows: Rows = found["sizes"]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(12, 4.2 * len(workloads)), layout="constrained")
    grid = figure.subplots(len(workloads), 2, squeeze=False)
    for line, workload in zip(grid, workloads, strict=True):
        own = [row for row in rows if row["workload"] == workload]
        gpus = [row["gpus"] for row in own]
        for number, (name, label) in enumerate(_SERVICES.items()):
            busy = [row["one_of_each"][name] for row in own]
            if not any(busy):
                continue
            line[0].plot(gpus, busy, color=f"C{number}", marker="o", label=label)
            if name in own[0]["needed"]:
                many = [row["needed"][name] for row in own]
                line[1].plot(gpus, many, color=f"C{number}", marker="o", label=label)
        cores = [row["needed"]["broker_cores"] for row in own]
        line[1].plot(gpus, cores, color="C2", marker="o", linestyle=":", label="RabbitMQ, cores")
        line[0].axhline(1, color="black", linewidth=0.8)
        line[0].set_ylabel(f"{workload}: how full one of each is")
        line[1].set_ylabel("how many are needed")
        for axes in line:
            _logarithmic(axes, gpus)
    _finish(figure, [grid[0][0], grid[0][1]])
    return figure


def _draw_four(found: Mapping[str, Any]) -> Figure:
    rows: Rows = found["four"]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(16, 3.6 * len(workloads)), layout="constrained")
    grid = figure.subplots(len(workloads), len(_FOUR_PANELS), squeeze=False)
    for line, workload in zip(grid, workloads, strict=True):
        own = [row for row in rows if row["workload"] == workload]
        for axes, (name, title) in zip(line, _FOUR_PANELS, strict=True):
            for topology in dict.fromkeys(row["topology"] for row in own):
                points = [(r["rate"], r[name]) for r in own if r["topology"] == topology]
                axes.plot(*zip(*points, strict=True), marker="o", label=topology)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("requests/s")
            axes.grid(alpha=0.3)
            if name == "goodput":
                axes.set_ylim(bottom=0)
            else:
                axes.set_yscale("log")
        line[0].set_ylabel(workload)
    _finish(figure, [grid[0][0]])
    return figure


def _logarithmic(axes: Axes, gpus: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = gpus[::2]
    axes.set_xticks(shown, [str(number) for number in shown])
    axes.set_yscale("log")
    axes.set_xlabel("GPUs")
    axes.grid(alpha=0.3)


def _finish(figure: Figure, labelled: Sequence[Axes]) -> None:
    found: dict[str, Any] = {}
    for axes in labelled:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=6)
